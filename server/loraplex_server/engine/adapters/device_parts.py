"""The parts of an adapter on the device beside the factors of the LoRA kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan, ModulePlan, PrefixPlan
from loraplex_server.model.layers.forward_context import FallbackParts, TokenRows

from .plan_tensors import map_tensors


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """The parts of one adapter, first on the host, then in the pool."""

    fallback: FallbackParts = field(default_factory=FallbackParts)
    prefix: PrefixPlan | None = None
    gates: Mapping[str, Tensor] = field(default_factory=dict)  # MLP block or projection → float32

    @staticmethod
    def of(
        plan: AdapterPlan,
        fallback_modules: Mapping[str, ModulePlan],
        in_scales: Mapping[str, Tensor],
        *,
        input_embedding: str,
        output_head: str,
    ) -> DeviceParts:
        """Return the parts with the plan's own tensors. For the mappings see the packer."""
        token_rows = {
            name: _token_rows(rows)
            for name, rows in (
                (input_embedding, plan.embedding_rows),
                (output_head, plan.head_rows),
            )
            if rows
        }
        return DeviceParts(
            FallbackParts(
                fallback_modules,
                plan.replaced_weights,
                plan.norms,
                token_rows,
                plan.stacked,
                in_scales,
            ),
            plan.prefix,
            {name: experts.gate for name, experts in plan.experts.items()},
        )

    def tensors(self, dtype: torch.dtype) -> list[tuple[Tensor, torch.dtype]]:
        """Return each tensor once, with its dtype on the device, in a fixed order."""
        tensors: list[tuple[Tensor, torch.dtype]] = []

        def note(tensor: Tensor, wanted: torch.dtype) -> Tensor:
            tensors.append((tensor, wanted if tensor.is_floating_point() else tensor.dtype))
            return tensor

        map_tensors((self.fallback, self.prefix), lambda tensor: note(tensor, dtype))
        map_tensors(self.gates, lambda tensor: note(tensor, torch.float32))
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> DeviceParts:
        """Return the parts with other tensors, in the order of ``self.tensors``."""
        remaining = iter(tensors)
        fallback, prefix = map_tensors((self.fallback, self.prefix), lambda _: next(remaining))
        return DeviceParts(fallback, prefix, map_tensors(self.gates, lambda _: next(remaining)))


def _token_rows(rows: Mapping[int, Tensor]) -> TokenRows:
    ids = sorted(rows)
    return TokenRows(torch.tensor(ids, dtype=torch.int64), torch.stack([rows[id] for id in ids]))
