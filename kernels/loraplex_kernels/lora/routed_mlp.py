"""The experts of an MLP block for captured steps, which read each row's adapter from a tensor.

A *pair* is a row as one of its experts sees it. Rows of an adapter without experts in the block are
one pair, of their own slot with weight 1. Rows without an adapter have no pair. ``gate_up`` holds
the base products:

    pair (t, e):  g, u = gate_up[t] + Δ_e(x[t])      a_e = silu(g) · u      ``gate_pairs``
    row t:        act  = Σ_e w_e a_e,  or silu(g) · u of gate_up[t]         ``mix_pairs``
                  out += Σ_e w_e Δ_e(a_e)                                   ``add_pairs``

The same launches apply all adapters of a block, and their shapes depend on the number of rows
alone. On a CPU the PyTorch versions below run, which define the result. They read the slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.formats.gate_table import MAX_CHOICES, GateTable
from loraplex_kernels.formats.layout import NO_PAGE, LoraSegments, LoraTables
from loraplex_kernels.layers.model_ops import silu_mul
from loraplex_kernels.reference.lora import lora_apply_reference

from .experts import route_top_k, weighted_sum
from .segments import build_segments, expand_routed


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """The pairs of a step in one block. Tensors of pairs are ordered by row on a CPU, and by
    position in ``segments`` on a GPU."""

    slots: Tensor  # int32 [n_rows, MAX_CHOICES], -1 = no pair
    weights: Tensor  # float32 [n_rows, MAX_CHOICES]
    segments: LoraSegments  # over rows, weighted


def route_pairs(x: Tensor, row_slots: Tensor, storage: Tensor, table: GateTable) -> RoutedPairs:
    """Route ``x`` [n_rows, hidden_size], the input of the block. See ``route_by_slot``."""
    slots, weights = route_by_slot(x, row_slots, storage, table)
    segments = expand_routed(slots, weights, n_slots=table.load.shape[0])
    return RoutedPairs(slots, weights, segments)


def route_by_slot(
    x: Tensor, row_slots: Tensor, storage: Tensor, table: GateTable
) -> tuple[Tensor, Tensor]:
    """Return slots int32 and weights float32 [n_rows, MAX_CHOICES]; -1 and 0 where a row has fewer.

    ``row_slots`` int32 [n_rows]; negative means that the row has no adapter. Adds to the table's
    load. On a GPU this is one launch.
    """
    shape = (x.shape[0], MAX_CHOICES)
    if x.is_cuda:
        from loraplex_kernels.triton.moe_gate import route_by_slot_triton

        slots = torch.empty(shape, dtype=torch.int32, device=x.device)
        weights = torch.empty(shape, dtype=torch.float32, device=x.device)
        route_by_slot_triton(x, row_slots, storage, table, slots=slots, weights=weights)
        return slots, weights
    slots = torch.full(shape, -1, dtype=torch.int32)
    weights = torch.zeros(shape, dtype=torch.float32)
    gates = storage.view(torch.float32)
    for slot in sorted({slot for slot in row_slots.tolist() if slot >= 0}):
        rows = torch.nonzero(row_slots == slot).flatten()
        offset, n_experts, first, k = table.words[slot].tolist()
        if offset == NO_PAGE:
            slots[rows, 0], weights[rows, 0] = slot, 1.0
            continue
        gate = gates[offset : offset + n_experts * x.shape[1]].view(n_experts, -1)
        index, weight = route_top_k(x[rows], gate, k)
        slots[rows, :k], weights[rows, :k] = first + index, weight
        table.load[first : first + n_experts] += torch.bincount(
            index.flatten(), minlength=n_experts
        )
    return slots, weights


def gate_pairs(
    x: Tensor,  # [n_rows, hidden_size]
    gate_up: Tensor,  # [n_rows, 2·ff]
    pairs: RoutedPairs,
    tables: LoraTables,
) -> Tensor:
    """Return ``silu(gate) · up`` of each row and chosen expert, [n_rows · MAX_CHOICES, ff].

    The base's products come from ``gate_up``; the LoRA of the pair's expert is added. The values of
    unused places (no expert) are undefined.
    """
    if x.is_cuda:
        from loraplex_kernels.triton.moe import gate_pairs_triton

        return gate_pairs_triton(x, gate_up, tables, pairs.segments)
    products = gate_up.repeat_interleave(MAX_CHOICES, 0)
    rows = x.repeat_interleave(MAX_CHOICES, 0)
    segments = build_segments(pairs.slots.flatten())
    lora_apply_reference(rows, tables, segments, out=products)
    return silu_mul(products)


def mix_pairs(gate_up: Tensor, pair_act: Tensor, pairs: RoutedPairs) -> Tensor:
    """Return the input of the down linear [n_rows, ff]."""
    if gate_up.is_cuda:
        from loraplex_kernels.triton.moe import mix_pairs_triton

        return mix_pairs_triton(gate_up, pair_act, pairs.segments)
    choices = pair_act.view(*pairs.slots.shape, -1)
    choices = choices.masked_fill((pairs.slots < 0).unsqueeze(2), 0.0)
    mixed = weighted_sum(choices, pairs.weights).to(gate_up.dtype)
    return torch.where(pairs.slots[:, :1] >= 0, mixed, silu_mul(gate_up))


def add_pairs(
    pair_act: Tensor,  # [n_rows · MAX_CHOICES, ff]
    act: Tensor,  # [n_rows, ff]
    pairs: RoutedPairs,
    tables: LoraTables,
    out: Tensor,
) -> None:
    """Add the low-rank products of the pairs to ``out`` [n_rows, hidden_size] in place."""
    if act.is_cuda:
        from loraplex_kernels.triton.moe import add_pairs_triton

        add_pairs_triton(pair_act, act, tables, pairs.segments, out=out)
        return
    choices = pair_act.view(*pairs.slots.shape, -1)
    for j in range(MAX_CHOICES):
        segments = build_segments(pairs.slots[:, j], pairs.weights[:, j])
        lora_apply_reference(choices[:, j], tables, segments, out=out)
