"""What the rows of an adapter ask of the layers, where a step is recorded beforehand."""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan
from loraplex_kernels.routers import MAX_CHOICES, MAX_EXPERTS
from loraplex_router.experts import experts_per_row
from loraplex_server.model.routed import shares_down

from .device_parts import DeviceParts

__all__ = ["LayerKind", "kind_of"]


class LayerKind(IntEnum):
    """What the layers of a step have to be able to do; each can do what those before it can."""

    BASE = 0
    LORA = 1  # low-rank factors, scales and biases of outputs
    INPUT_SCALES = 2  # of linears that are packed with no other
    ROUTED_MLP = 3  # experts behind one gate of each MLP block
    ROUTED_PROJECTIONS = 4  # experts behind a gate of each projection


def kind_of(
    parts: DeviceParts, plan: AdapterPlan, *, outside: Collection[str], projections: Collection[str]
) -> LayerKind | None:
    """None for an adapter whose rows no recorded step computes.

    ``outside``: the embedding and the head, which run around what is recorded, in any form.
    ``projections``: the linears that may have a gate of their own.
    """
    fallback = parts.fallback
    changed = {*fallback.modules, *fallback.replaced_weights, *fallback.token_rows}
    if fallback.norms or fallback.stacked or not changed <= set(outside):
        return None
    kind = LayerKind.INPUT_SCALES if fallback.in_scales else LayerKind.LORA
    for place, experts in plan.experts.items():
        is_projection = place in projections
        if not _fits(experts):
            return None
        if not is_projection and not (shares_down(experts) and _is_alone(place, plan)):
            return None
        kind = max(kind, LayerKind.ROUTED_PROJECTIONS if is_projection else LayerKind.ROUTED_MLP)
    return kind


def _fits(experts: ExpertPlan) -> bool:
    n_experts = len(experts.experts)
    per_row = experts_per_row(experts.strategy, n_experts, experts.top_k)
    return n_experts <= MAX_EXPERTS and per_row <= MAX_CHOICES


def _is_alone(block: str, plan: AdapterPlan) -> bool:
    """Whether the block is changed by its experts alone: pairs have no plain parts beside them."""
    return not any(name.startswith(f"{block}.") for name in plan.modules)
