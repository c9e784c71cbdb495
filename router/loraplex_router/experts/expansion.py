"""Routed rows become (row, expert, weight) pairs, and pairs become the kernel's segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_kernels.formats.layout import LoraSegments
from loraplex_kernels.lora.experts import StepPairs, group_pairs, route_and_group
from loraplex_kernels.lora.segments import expand_routed

from .gates import Routing, experts_per_row, route

NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class PlacedExperts:
    """The experts of one block or projection of one adapter, on the device of the rows."""

    gate: Tensor  # float32 [n_experts, in_features]
    slots: Tensor  # int32 [n_experts], pool slot of each expert
    strategy: RoutingStrategy
    top_k: int
    top_p: float
    load: Tensor  # int64 [n_experts], rows routed to each so far, added to in place
    shared_down: bool = True  # False where an expert scales or shifts its down output (MixDoRA)

    @property
    def n_experts(self) -> int:
        return int(self.gate.shape[0])

    @property
    def k(self) -> int:
        """Experts of each row, at most; see ``experts_per_row``."""
        return experts_per_row(self.strategy, self.n_experts, self.top_k)


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """The rows of a step that one layer routes to the experts of one adapter.

    ``rows`` and ``pair_rows`` are the same for every layer of a step.
    """

    rows: Tensor  # int64 [n_rows], rows of the step, ascending
    pair_rows: Tensor  # int64 [n_rows * experts.k], every row k times: ``pair_rows_of``
    experts: PlacedExperts

    @staticmethod
    def pair_rows_of(rows: Tensor, k: int) -> Tensor:
        return rows.repeat_interleave(k)


class Pairs(NamedTuple):
    """The pairs of all routed adapters of a step. Pair ``p`` is (row, choice), row-major."""

    weights: tuple[Tensor, ...]  # per adapter float32 [n_rows, k]
    segments: LoraSegments  # over pairs: row ``p`` is pair ``p``; weighted


def expand(hidden: Tensor, routed: Sequence[RoutedRows]) -> Pairs:
    """Routes the rows of each adapter. ``hidden`` [n_rows of the step, in_features].

    On a device nothing waits for it: the numbers of segments and pairs follow from the arguments.
    On a CPU segments of experts nobody chose are empty, and pairs without an expert, which only
    top-p makes, stand in a last segment of slot -1; on a GPU both are in no segment.
    """
    if hidden.is_cuda:
        return expand_by_slots(hidden, routed)
    first = routed[0].experts
    if len(routed) == 1 and first.strategy is RoutingStrategy.TOP_K:  # the usual case, in one call
        rows = _rows_of(hidden, routed[0])
        weight, grouped = route_and_group(rows, first.gate, first.top_k, first.load)
        segments = LoraSegments(first.slots, grouped.indptr, grouped.indices, grouped.weights)
        return Pairs((weight,), segments)
    routings = [_route(hidden, r) for r in routed]
    n_segments = sum(r.experts.n_experts for r in routed)
    ids = _segment_ids(routings, routed, n_segments)  # int32 [n_pairs]
    slots = _slots(routed)
    weights = tuple(g.weight.contiguous() for g in routings)
    weight = torch.cat([w.reshape(-1) for w in weights])
    grouped = group_pairs(ids, weight, int(slots.shape[0]))
    _count(grouped.indptr, routed)
    return Pairs(weights, LoraSegments(slots, grouped.indptr, grouped.indices, grouped.weights))


def expand_by_slots(hidden: Tensor, routed: Sequence[RoutedRows]) -> Pairs:
    """``expand`` in the operators of a GPU, on any device: pairs are grouped by their pool slot."""
    choices = [_choose(hidden, r) for r in routed]
    slots = torch.cat([slot.reshape(-1) for slot, _ in choices])
    weights = tuple(weight for _, weight in choices)
    weight = torch.cat([w.reshape(-1) for w in weights])
    return Pairs(weights, expand_routed(slots.unsqueeze(-1), weight.unsqueeze(-1)))


def projection_segments(inputs: Tensor, routed: Sequence[RoutedRows]) -> LoraSegments:
    """Segments over the rows of the step themselves, for experts of one projection.

    MoLA, LoRAMoE and Arrow add ``Σ w_e B_e A_e x`` to one linear, so a row simply stands in the
    segments of its k experts. ``inputs`` [n_rows, in_features] is what that linear reads.
    """
    if inputs.is_cuda:
        return projection_segments_by_slots(inputs, routed)
    pairs = expand(inputs, routed)
    rows = pair_rows(routed)
    segments = pairs.segments
    return LoraSegments(
        segments.slots,
        segments.indptr,
        rows[segments.indices.long()].int(),  # the order is stable: rows ascend within a segment
        segments.weights,
    )


def projection_segments_by_slots(inputs: Tensor, routed: Sequence[RoutedRows]) -> LoraSegments:
    """``projection_segments`` in the operators of a GPU, on any device."""
    shape = inputs.shape[0], max(r.experts.k for r in routed)
    slots = torch.full(shape, NO_SLOT, dtype=torch.int32, device=inputs.device)
    weights = torch.zeros(shape, dtype=torch.float32, device=inputs.device)
    for r in routed:  # whose rows are disjoint
        slot, weight = _choose(inputs, r)
        slots[:, : r.experts.k].index_copy_(0, r.rows, slot)
        weights[:, : r.experts.k].index_copy_(0, r.rows, weight)
    return expand_routed(slots, weights)


def _choose(hidden: Tensor, routed: RoutedRows) -> tuple[Tensor, Tensor]:
    """Pool slots int32 and weights float32 [n_rows, k] of an adapter's rows; counts them."""
    index, weight = _route(hidden, routed)
    is_used = index >= 0
    expert = index.clamp(min=0).long()
    routed.experts.load.scatter_add_(0, expert.reshape(-1), is_used.long().reshape(-1))
    slots = torch.where(is_used, routed.experts.slots[expert], NO_SLOT)
    return slots, weight.contiguous()


def step_pairs(routed: Sequence[RoutedRows]) -> StepPairs:
    """The pairs of ``expand``, by row."""
    return StepPairs(pair_rows(routed), tuple((r.rows, r.experts.k) for r in routed))


def pair_rows(routed: Sequence[RoutedRows]) -> Tensor:
    """int64 [n_pairs]: the row of the step that each pair belongs to."""
    return routed[0].pair_rows if len(routed) == 1 else torch.cat([r.pair_rows for r in routed])


def _route(hidden: Tensor, routed: RoutedRows) -> Routing:
    rows, experts = _rows_of(hidden, routed), routed.experts
    return route(rows, experts.gate, experts.strategy, top_k=experts.top_k, top_p=experts.top_p)


def _rows_of(hidden: Tensor, routed: RoutedRows) -> Tensor:
    every = routed.rows.shape[0] == hidden.shape[0]  # rows ascend, each once: it is all of them
    return hidden if every else hidden.index_select(0, routed.rows)


def _segment_ids(
    routings: Sequence[Routing], routed: Sequence[RoutedRows], n_segments: int
) -> Tensor:
    ids, first = [], 0
    for routing, r in zip(routings, routed, strict=True):
        index = routing.expert_index.reshape(-1)
        shifted = index + first if first else index
        if r.experts.strategy is RoutingStrategy.TOP_P:
            shifted = torch.where(index < 0, n_segments, shifted)
        ids.append(shifted)
        first += r.experts.n_experts
    return torch.cat(ids)


def _slots(routed: Sequence[RoutedRows]) -> Tensor:
    """Return the expert of each segment. The last segment is padding if pairs may lack experts."""
    parts = [r.experts.slots for r in routed]
    if any(r.experts.strategy is RoutingStrategy.TOP_P for r in routed):
        parts.append(torch.full((1,), -1, dtype=torch.int32, device=parts[0].device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _count(starts: Tensor, routed: Sequence[RoutedRows]) -> None:
    first = 0
    for r in routed:
        r.experts.load.add_(starts[first : first + r.experts.n_experts + 1].diff())
        first += r.experts.n_experts
