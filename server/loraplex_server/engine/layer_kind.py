"""What the rows of an adapter ask of the layers, where a step is recorded beforehand."""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan
from loraplex_kernels.routers import MAX_CHOICES, MAX_EXPERTS
from loraplex_router.experts import experts_per_row
from loraplex_server.model.routed import shares_down

from .device_parts import DeviceParts

__all__ = ["LayerKind", "kind_of", "least_kind"]


class LayerKind(IntEnum):
    """What the layers of a step are able to do, by what they cost."""

    BASE = 0
    LORA = 1  # low-rank factors, scales and biases of outputs
    INPUT_SCALES = 2  # of linears that are packed with no other
    SLICE_SCALES = 3  # of inputs of linears that are packed together, each by its own
    ROUTED_MLP = 4  # experts behind one gate of each MLP block
    OWN_DOWNS = 5  # of these experts, which scale or shift their down outputs
    ROUTED_PROJECTIONS = 6  # experts behind a gate of each projection
    ALL = 7

    def does(self, other: LayerKind) -> bool:
        """Whether such layers compute rows that ask for ``other``."""
        return other in _DOES[self]

    @property
    def scales_inputs(self) -> bool:
        return self.does(LayerKind.INPUT_SCALES)

    @property
    def has_pairs(self) -> bool:
        """Whether MLP blocks run over the pairs of ``kernels.moe_by_slot``."""
        return self.does(LayerKind.ROUTED_MLP)


_LOW_RANK = frozenset({LayerKind.BASE, LayerKind.LORA})
_SCALED = _LOW_RANK | {LayerKind.INPUT_SCALES}
_ROUTED = _SCALED | {LayerKind.ROUTED_MLP}
_DOES = {
    LayerKind.BASE: frozenset({LayerKind.BASE}),
    LayerKind.LORA: _LOW_RANK,
    LayerKind.INPUT_SCALES: _SCALED,
    LayerKind.SLICE_SCALES: _SCALED | {LayerKind.SLICE_SCALES},
    LayerKind.ROUTED_MLP: _ROUTED,
    LayerKind.OWN_DOWNS: _ROUTED | {LayerKind.OWN_DOWNS},
    LayerKind.ROUTED_PROJECTIONS: _ROUTED | {LayerKind.ROUTED_PROJECTIONS},
    LayerKind.ALL: frozenset(LayerKind),
}


def least_kind(asked: Collection[LayerKind]) -> LayerKind:
    """The cheapest layers that compute rows of all these kinds."""
    return next(kind for kind in LayerKind if _DOES[kind].issuperset(asked))


def kind_of(
    parts: DeviceParts,
    plan: AdapterPlan,
    *,
    outside: Collection[str],
    projections: Collection[str],
    lone: Collection[str],
) -> LayerKind | None:
    """None for an adapter whose rows no recorded step computes.

    ``outside``: the embedding and the head, which run around what is recorded, in any form.
    ``projections``: the linears that may have a gate of their own. ``lone``: those of them that are
    packed with no other.
    """
    fallback = parts.fallback
    changed = {*fallback.modules, *fallback.replaced_weights, *fallback.token_rows}
    if fallback.norms or fallback.stacked or not changed <= set(outside):
        return None
    asked = {LayerKind.LORA}
    for name in fallback.in_scales:
        asked.add(LayerKind.INPUT_SCALES if name in lone else LayerKind.SLICE_SCALES)
    for place, experts in plan.experts.items():
        if not _fits(experts):
            return None
        if place in projections:
            asked.add(LayerKind.ROUTED_PROJECTIONS)
        elif _is_alone(place, plan):
            asked.add(LayerKind.ROUTED_MLP if shares_down(experts) else LayerKind.OWN_DOWNS)
        else:
            return None
    return least_kind(asked)


def _fits(experts: ExpertPlan) -> bool:
    n_experts = len(experts.experts)
    per_row = experts_per_row(experts.strategy, n_experts, experts.top_k)
    return n_experts <= MAX_EXPERTS and per_row <= MAX_CHOICES


def _is_alone(block: str, plan: AdapterPlan) -> bool:
    """Whether the block is changed by its experts alone: pairs have no plain parts beside them."""
    return not any(name.startswith(f"{block}.") for name in plan.modules)
