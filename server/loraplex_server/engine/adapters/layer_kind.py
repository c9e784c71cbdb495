"""The kinds of layers that captured steps have, and the kind that an adapter needs."""

from collections.abc import Collection
from enum import IntEnum

from loraplex_adapter_store.plan import AdapterPlan, ExpertPlan, RoutingStrategy
from loraplex_kernels.formats.gate_table import MAX_CHOICES, MAX_EXPERTS
from loraplex_server.model.layers.routed import shares_down

from .device_parts import DeviceParts


class LayerKind(IntEnum):
    """The layers of a captured step, by cost. Each kind also computes the rows of lower kinds."""

    BASE = 0
    LORA = 1  # low-rank factors, scales and biases of outputs
    ROUTED_MLP = 2  # MixLoRA: experts behind one gate of each MLP block


def kind_of(
    parts: DeviceParts,
    plan: AdapterPlan,
    *,
    outside: Collection[str],
    projections: Collection[str],
) -> LayerKind | None:
    """Return the kind that computes the adapter's rows, or None if they need an eager forward.

    ``outside``: the embedding and the head, which run around the captured layers in any form.
    ``projections``: the linears that may have a gate of their own.
    """
    fallback = parts.fallback
    changed = {*fallback.modules, *fallback.replaced_weights, *fallback.token_rows}
    if fallback.norms or fallback.stacked or fallback.in_scales or not changed <= set(outside):
        return None
    if not plan.experts:
        return LayerKind.LORA
    if all(
        place not in projections and _is_alone(place, plan) and _fits(experts)
        for place, experts in plan.experts.items()
    ):
        return LayerKind.ROUTED_MLP
    return None


def _fits(experts: ExpertPlan) -> bool:
    return (
        experts.strategy is RoutingStrategy.TOP_K
        and len(experts.experts) <= MAX_EXPERTS
        and experts.top_k <= MAX_CHOICES
        and shares_down(experts)
    )


def _is_alone(block: str, plan: AdapterPlan) -> bool:
    """Return True if only experts change the block, so pairs have no unrouted factors."""
    return not any(name.startswith(f"{block}.") for name in plan.modules)
