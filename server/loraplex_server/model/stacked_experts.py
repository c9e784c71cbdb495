"""The stacked experts of a MoE base: rows of an adapter that changes them are computed once more.

Whatever the block does with its parameters, it does with the adapter's: it is called again on these
rows with W + ΔW in their place. That forms the changed weights of a layer for the step, which is
slow and exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loraplex_adapter_store.plan import StackedFactors

from .forward_context import ForwardContext

__all__ = ["AdaptedExperts", "replace_experts"]

_INPUTS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),  # GPT-OSS
)


class AdaptedExperts(nn.Module):
    """Replaces the block and keeps its parameters under the names of the checkpoint."""

    def __init__(self, name: str, experts: nn.Module, step: ForwardContext) -> None:
        super().__init__()
        for part, value in experts.named_parameters(recurse=False):
            self.register_parameter(part, value)
        self._experts = experts
        self._name = name
        self._step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        """``inputs`` [T, …] each, a row of the step's in each entry of the first axis."""
        out: Tensor = self._experts(*inputs)
        for fallback in self._step.fallback:
            changes = self._changes(fallback.parts.stacked)
            if changes:
                rows = tuple(part[fallback.rows] for part in inputs)
                changed: Tensor = torch.func.functional_call(self._experts, changes, rows)
                out = out.index_copy(0, fallback.rows, changed.to(out.dtype))
        return out

    def _changes(self, stacked: Mapping[str, StackedFactors]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part, value in self._experts.named_parameters(recurse=False):
            factors = stacked.get(f"{self._name}.{part}")
            if factors is not None:
                found[part] = torch.baddbmm(value, factors.left, factors.right)
        return found


def replace_experts(model: nn.Module, step: ForwardContext) -> frozenset[str]:
    """Replaces every block of stacked experts; returns the names of its stacked parameters.

    A block that does not take a row of the step in each entry of its inputs stays as it is.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if any(value.dim() == 3 for value in module.parameters(recurse=False))
        and tuple(inspect.signature(module.forward).parameters) in _INPUTS
    ]
    for name, module in found:
        model.set_submodule(name, AdaptedExperts(name, module, step))
    return frozenset(
        f"{name}.{part}"
        for name, module in found
        for part, value in module.named_parameters(recurse=False)
        if value.dim() == 3
    )
