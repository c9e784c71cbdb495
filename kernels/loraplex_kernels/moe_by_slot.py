"""An MLP block's experts, where the adapter of each row is data: for recorded steps.

A *pair* is a row as one of its experts sees it. Rows of adapters without experts are one pair, of
their own slot with weight 1; rows without an adapter are none. ``gate_up`` are the base's products:

    pair (t, e):  g, u = gate_up[t] + Δ_e(x[t])      a_e = silu(g) · u      ``gate_pairs``
    row t:        act  = Σ_e w_e a_e,  or silu of gate_up[t] without pairs  ``mix_pairs``
                  out += Σ_e w_e Δ_e(a_e)                                   ``add_pairs``

So all adapters of a block are applied by the same launches, whose shapes depend on the number of
rows alone. Where experts scale or shift their down outputs (MixDoRA) the last line is another, of
the base's product of every pair; rows without pairs keep theirs:

    pair (t, e):  d = W_down a_e, with Δ_e(a_e), scale and bias on top   the operator by ``by_pair``
    row t:        out = Σ_e w_e d_e                                        ``sum_pairs``
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import weighted_sum
from .input_scales import scale_inputs_reference
from .layout import LoraSegments, LoraTables, LoraTarget
from .model_ops import silu_mul
from .reference import lora_apply_reference
from .routers import MAX_CHOICES, RouterTable, route_by_slot
from .segments import build_segments, expand_routed

__all__ = [
    "InputScales",
    "RoutedPairs",
    "add_pairs",
    "gate_pairs",
    "mix_pairs",
    "route_pairs",
    "sum_pairs",
]


@dataclass(frozen=True, slots=True)
class InputScales:
    """Of the down linear's inputs, see ``input_scales.scale_inputs``."""

    row_slots: Tensor  # int32 [n_rows]
    storage: Tensor
    offsets: Tensor  # int64 [n_slots]


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """The pairs of a step at one block. On a CPU they stand by row; on a GPU by slot, as the
    segments order them, and those of no expert last."""

    slots: Tensor  # int32 [n_rows, MAX_CHOICES], −1 = no pair
    weights: Tensor  # float32 [n_rows, MAX_CHOICES]
    by_row: LoraSegments  # over rows; weighted
    by_pair: LoraSegments  # over the pairs themselves


def route_pairs(
    x: Tensor, row_slots: Tensor, storage: Tensor, table: RouterTable, pair_ids: Tensor
) -> RoutedPairs:
    """``x`` [n_rows, hidden_size], the block's input; see ``routers.route_by_slot``.

    ``pair_ids`` int32 [n_rows · MAX_CHOICES or more] on a GPU: 0, 1, 2 …
    """
    slots, weights = route_by_slot(x, row_slots, storage, table, takes_plain=True)
    by_row = expand_routed(slots, weights, n_slots=table.load.shape[0])
    if not x.is_cuda:
        return RoutedPairs(slots, weights, by_row, build_segments(slots.flatten()))
    from .triton import segments_of_pairs

    return RoutedPairs(slots, weights, by_row, segments_of_pairs(by_row, pair_ids))


def gate_pairs(
    x: Tensor,  # [n_rows, hidden_size]
    gate_up: Tensor,  # [n_rows, 2·ff]
    pairs: RoutedPairs,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
) -> Tensor:
    """The activation of every pair [n_rows · MAX_CHOICES, ff]; of no pair: anything."""
    if x.is_cuda:
        from .triton import gate_pairs_triton

        return gate_pairs_triton(x, gate_up, storage, target, tables, pairs.by_row)
    of_pairs = gate_up.repeat_interleave(MAX_CHOICES, 0)
    lora_apply_reference(
        x.repeat_interleave(MAX_CHOICES, 0),
        storage,
        target,
        tables,
        pairs.by_pair,
        out=of_pairs,
    )
    return silu_mul(of_pairs)


def mix_pairs(
    gate_up: Tensor, pair_act: Tensor, pairs: RoutedPairs, scales: InputScales | None
) -> Tensor:
    """What the down linear reads, [n_rows, ff]. Scales ``pair_act`` in place as it does the rows.

    Only rows of one pair may have a scale: an adapter has no plain parts beside experts.
    """
    if gate_up.is_cuda:
        from .triton import mix_pairs_triton

        return mix_pairs_triton(gate_up, pair_act, pairs.by_row, scales)
    n_rows, width = pairs.slots.shape
    choices = pair_act.view(n_rows, width, -1)
    choices = choices.masked_fill((pairs.slots < 0).unsqueeze(2), 0.0)
    mixed = weighted_sum(choices, pairs.weights).to(gate_up.dtype)
    act = torch.where(pairs.slots[:, :1] >= 0, mixed, silu_mul(gate_up))
    if scales is not None:
        scale_inputs_reference(act, scales.row_slots, scales.storage, scales.offsets)
        slots = scales.row_slots.repeat_interleave(width)
        scale_inputs_reference(pair_act, slots, scales.storage, scales.offsets)
    return act


def add_pairs(
    pair_act: Tensor,  # [n_rows · MAX_CHOICES, ff]
    act: Tensor,  # [n_rows, ff]
    pairs: RoutedPairs,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    out: Tensor,
) -> None:
    """Adds to ``out`` [n_rows, hidden_size] in place the pairs' low-rank products."""
    if act.is_cuda:
        from .triton import add_pairs_triton

        both = pairs.by_pair, pairs.by_row
        add_pairs_triton(pair_act, act, storage, target, tables, *both, out=out)
        return
    choices = pair_act.view(*pairs.slots.shape, -1)
    for j in range(MAX_CHOICES):
        segments = build_segments(pairs.slots[:, j], pairs.weights[:, j])
        lora_apply_reference(choices[:, j], storage, target, tables, segments, out=out)


def sum_pairs(of_pairs: Tensor, pairs: RoutedPairs, out: Tensor) -> None:
    """``out`` [n_rows, width] becomes the weighted sum of each row's pairs, where it has any.

    ``of_pairs`` [n_rows · MAX_CHOICES, width]; of no pair: anything.
    """
    if out.is_cuda:
        from .triton import sum_pairs_triton

        sum_pairs_triton(of_pairs, pairs.by_row, out=out)
        return
    choices = of_pairs.view(*pairs.slots.shape, -1)
    choices = choices.masked_fill((pairs.slots < 0).unsqueeze(2), 0.0)
    total = weighted_sum(choices, pairs.weights).to(out.dtype)
    out.copy_(torch.where(pairs.slots[:, :1] >= 0, total, out))
