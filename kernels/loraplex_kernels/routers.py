"""Which experts each row goes to, where the adapter of a row is data: for recorded steps.

A router belongs to one place of the model (an MLP block or a projection). Of each adapter slot the
place's table says whether the adapter in it has experts there, where its gate lies, and its rule:

    s = gate · x   (|gate · x| with BY_SIZE)     experts by falling s, of equal ones the lower first
    kept: the first n_kept, and of these as long as those before have a p of at most top_p together
    weight = p, the softmax over all experts; with RENORMALISED over those kept

All gates of ``loraplex_router.experts`` are such a rule. float32 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import NO_PAGE

__all__ = [
    "MAX_CHOICES",
    "MAX_EXPERTS",
    "ROUTER_WORDS",
    "GateFlags",
    "GateRule",
    "RouterTable",
    "route_by_slot",
    "route_by_slot_reference",
]

MAX_EXPERTS = 64  # of one gate
MAX_CHOICES = 8  # experts of a row
ROUTER_WORDS = 5  # of ``RouterTable.words``


class GateFlags(IntFlag):
    BY_SIZE = 1  # a prototype's sign means nothing (Arrow)
    RENORMALISED = 2  # weights are the softmax over the experts kept (MixLoRA, MoLA, Arrow)
    IN_ORDER = 4  # choices stand by expert, not by weight (LoRAMoE)


class GateRule(NamedTuple):
    n_kept: int  # experts of a row, at most
    flags: GateFlags
    top_p: float = float("inf")  # no bound


@dataclass(frozen=True, slots=True)
class RouterTable:
    """One place's routers by adapter slot, on the device. Strided views; read at replay."""

    # int64 [n_slots, ROUTER_WORDS]: offset of the gate float32 [n_experts, in_features] in the
    # storage, counted in float32 (NO_PAGE: the slot has no experts here), number of experts, slot
    # of the first (the others follow), n_kept, flags
    words: Tensor
    top_p: Tensor  # float32 [n_slots]
    load: Tensor  # int64 [n_slots], contiguous; rows routed so far to the expert in each slot


def route_by_slot(
    x: Tensor,
    row_slots: Tensor,
    storage: Tensor,
    table: RouterTable,
    *,
    slice_index: int = 0,
    n_slices: int = 1,
    takes_plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """``x`` [n_rows, in_features], ``row_slots`` int32 [n_rows] (negative: no adapter) → slots
    int32 and weights float32 [n_rows, MAX_CHOICES]; −1 and 0 where a row has fewer.

    Expert slot e is named ``e · n_slices + slice_index``, as ``SliceOperator`` counts. With
    ``takes_plain`` a row whose adapter has no experts here gets its own slot with weight 1, else
    none. Adds to the table's load. On a GPU one launch, which depends on shapes alone; on a CPU
    the rows' slots are read.
    """
    if not x.is_cuda:
        return route_by_slot_reference(
            x,
            row_slots,
            storage,
            table,
            slice_index=slice_index,
            n_slices=n_slices,
            takes_plain=takes_plain,
        )
    from .triton import route_by_slot_triton  # imports Triton, which a CPU does not need

    shape = (x.shape[0], MAX_CHOICES)
    slots = torch.empty(shape, dtype=torch.int32, device=x.device)
    weights = torch.empty(shape, dtype=torch.float32, device=x.device)
    route_by_slot_triton(
        x,
        row_slots,
        storage,
        table,
        slots=slots,
        weights=weights,
        slice_index=slice_index,
        n_slices=n_slices,
        takes_plain=takes_plain,
    )
    return slots, weights


def route_by_slot_reference(
    x: Tensor,
    row_slots: Tensor,
    storage: Tensor,
    table: RouterTable,
    *,
    slice_index: int = 0,
    n_slices: int = 1,
    takes_plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """``route_by_slot`` in PyTorch, one adapter after the other."""
    shape = (x.shape[0], MAX_CHOICES)
    slots = torch.full(shape, -1, dtype=torch.int32, device=x.device)
    weights = torch.zeros(shape, dtype=torch.float32, device=x.device)
    gates = storage.view(torch.float32)
    for slot in sorted({int(slot) for slot in row_slots.tolist() if slot >= 0}):
        rows = torch.nonzero(row_slots == slot).flatten()
        offset, n_experts, first, n_kept, flags = map(int, table.words[slot].tolist())
        if offset == NO_PAGE:
            if takes_plain:
                slots[rows, 0], weights[rows, 0] = slot, 1.0
            continue
        gate = gates[offset : offset + n_experts * x.shape[1]].view(n_experts, -1)
        rule = GateRule(n_kept, GateFlags(flags), float(table.top_p[slot]))
        index, weight = _choose(torch.mm(x[rows].float(), gate.T), rule)
        n = index.shape[1]
        chosen = torch.where(index >= 0, (first + index) * n_slices + slice_index, -1)
        slots[rows, :n], weights[rows, :n] = chosen.int(), weight
        used = index[index >= 0]
        table.load[first : first + n_experts] += torch.bincount(used, minlength=n_experts)
    return slots, weights


def _choose(products: Tensor, rule: GateRule) -> tuple[Tensor, Tensor]:
    """int64 (−1 = none) and float32 [n, n_kept] of products [n, n_experts]."""
    scores = products.abs() if GateFlags.BY_SIZE in rule.flags else products
    p = torch.softmax(scores, dim=-1)
    _, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    order = order[:, : rule.n_kept]
    weight = p.gather(1, order)
    dropped = weight.cumsum(dim=-1) - weight > rule.top_p
    dropped[:, 0] = False  # the difference rounds; the first is kept by definition
    if GateFlags.RENORMALISED in rule.flags:
        kept = scores.gather(1, order).masked_fill(dropped, float("-inf"))
        weight = torch.softmax(kept, dim=-1)
    index, weight = order.masked_fill(dropped, -1), weight.masked_fill(dropped, 0.0)
    if GateFlags.IN_ORDER in rule.flags:  # all are kept
        index, by_index = torch.sort(index, dim=-1)
        weight = weight.gather(1, by_index)
    return index, weight
