"""The experts and routers of a mixture-of-experts base, with adapters that change their matrices.

A block of experts runs again with W + ΔW on the rows of such an adapter, and so does a router. This
computes the changed weights of a layer in each step, which is slow and exact.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from loraplex_adapter_store.plan import StackedFactors

from .forward_context import ForwardContext

_INPUTS = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),  # GPT-OSS
)
_PROBE_ROWS = 3


class AdaptedExperts(nn.Module):
    """Replaces a block of experts and keeps its parameters under their names."""

    def __init__(self, name: str, experts: nn.Module, step: ForwardContext) -> None:
        super().__init__()
        for part, value in experts.named_parameters(recurse=False):
            self.register_parameter(part, value)
        self._experts = experts
        self.stacked_weights = getattr(experts, "stacked_weights", {})
        # Experts whose weights are computed have no parameters that could be exchanged.
        self._run_with = getattr(experts, "run_with", partial(torch.func.functional_call, experts))
        self._name = name
        self._step = step

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the block. The first axis of each input is the step's rows."""
        out: Tensor = self._experts(*inputs)
        for fallback in self._step.fallback:
            changes = _changes(self._name, self._experts, fallback.parts.stacked)
            if changes:
                rows = tuple(part[fallback.rows] for part in inputs)
                changed: Tensor = self._run_with(changes, rows)
                out = out.index_copy(0, fallback.rows, changed.to(out.dtype))
        return out


class AdaptedRouter(nn.Module):
    """Replaces a router, which maps hidden states to one or more tensors of one row a token."""

    def __init__(self, name: str, router: nn.Module, step: ForwardContext) -> None:
        super().__init__()
        for part, value in router.named_parameters(recurse=False):
            self.register_parameter(part, value)
        self._router = router
        self._name = name
        self._step = step

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Route ``hidden`` [..., width]. The first axis of each result is the step's rows."""
        result: Tensor | tuple[Tensor, ...] = self._router(hidden)
        for fallback in self._step.fallback:
            changes = _changes(self._name, self._router, fallback.parts.stacked)
            if changes:
                rows = hidden.reshape(-1, hidden.shape[-1])[fallback.rows]
                changed = torch.func.functional_call(self._router, changes, (rows,))
                parts = zip(_tensors(result), _tensors(changed), strict=True)
                merged = tuple(old.index_copy(0, fallback.rows, new) for old, new in parts)
                result = merged[0] if isinstance(result, Tensor) else merged
        return result


def replace_experts(
    model: nn.Module, step: ForwardContext, routers: Collection[str]
) -> frozenset[str]:
    """Replace the blocks of stacked experts and ``routers``, which are names of modules.

    Returns the names of the parameters that adapters may change. Blocks with other inputs than
    ``_INPUTS``, and routers with other results, stay as they are.
    """
    blocks = [
        (name, module)
        for name, module in model.named_modules()
        if _stacks(module) and tuple(inspect.signature(module.forward).parameters) in _INPUTS
    ]
    named = [(name, model.get_submodule(name)) for name in sorted(routers)]
    known = [(name, module) for name, module in named if _maps_rows(module)]
    for name, module in blocks:
        model.set_submodule(name, AdaptedExperts(name, module, step))
    for name, module in known:
        model.set_submodule(name, AdaptedRouter(name, module, step))
    stacks = (f"{name}.{part}" for name, module in blocks for part in _stacks(module))
    return frozenset((*stacks, *(f"{name}.weight" for name, _ in known)))


def _stacks(module: nn.Module) -> Mapping[str, Callable[[], Tensor]]:
    """Return readers of the stacked weights, as parameters or as a module computes them."""
    computed: Mapping[str, Callable[[], Tensor]] = getattr(module, "stacked_weights", {})
    own = module.named_parameters(recurse=False)
    return {**{name: value.detach for name, value in own if value.dim() == 3}, **computed}


@torch.no_grad()
def _maps_rows(router: nn.Module) -> bool:
    """Run some rows together and one of them alone, and return True if its results are equal."""
    if len(inspect.signature(router.forward).parameters) != 1:
        return False
    weight = router.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE_ROWS, weight.shape[1], generator=generator).to(weight)
    try:
        together, alone = _tensors(router(rows)), _tensors(router(rows[1:2]))
    except (RuntimeError, ValueError):  # it needs another shape
        return False
    return all(
        whole.shape[0] == _PROBE_ROWS and torch.allclose(whole[1:2].float(), one.float())
        for whole, one in zip(together, alone, strict=True)
    )


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _changes(
    name: str, module: nn.Module, stacked: Mapping[str, StackedFactors]
) -> dict[str, Tensor]:
    """Return the parameters of ``module`` that an adapter changes, as W + ΔW."""
    changes: dict[str, Tensor] = {}
    matrices = {part: value.detach for part, value in module.named_parameters(recurse=False)}
    for part, read in {**matrices, **_stacks(module)}.items():
        factors = stacked.get(f"{name}.{part}")
        if factors is not None:
            value = read()
            left, right = factors.left.to(value.dtype), factors.right.to(value.dtype)
            stack = value.view(left.shape[0], left.shape[1], right.shape[2])
            changes[part] = torch.baddbmm(stack, left, right).view(value.shape)
    return changes
