"""One MLP block for a mixed step: base rows, plain LoRA rows and rows of routed MixLoRA adapters.

    g_e = W_gate h + B_gate^e A_gate^e h        u_e = W_up h + B_up^e A_up^e h
    a_e = act(g_e) ⊙ u_e
    y   = W_down (Σ_e w_e a_e) + Σ_e w_e B_down^e A_down^e a_e

The base products of gate and up are computed once per row and copied to the row's k experts. The
base down product is linear, so the activations are mixed *before* it: the frozen MLP costs what it
costs for a plain row, whatever k. (The published description computes the down product k times.)
Only routed rows are expanded. The order of operations is fixed, sums over experts run in slot
order, nothing is accumulated atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.layout import LoraSegments

from .expansion import Pairs, RoutedRows, expand, pair_rows
from .gates import GateStrategy

__all__ = ["AddPlain", "LoraOp", "MlpBlock", "mixed_mlp"]

# (x, segments, out): adds the segments' low-rank products of x to out in place; storage, target
# and tables of one linear group are bound to it.
LoraOp = Callable[[Tensor, LoraSegments, Tensor], None]
# (x, out): adds what the unrouted adapters of the step make of x; touches no other row.
AddPlain = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class MlpBlock:
    """The parts of one layer's MLP, as the model's owner binds them."""

    gate_up: Callable[[Tensor], Tensor]  # base product [n, hidden] → [n, 2·ff], gate then up
    down: Callable[[Tensor], Tensor]  # base product [n, ff] → [n, hidden]
    activation: Callable[[Tensor], Tensor]  # act(gate) ⊙ up: [n, 2·ff] → [n, ff]
    lora_gate_up: LoraOp
    lora_down: LoraOp
    plain_gate_up: AddPlain
    plain_down: AddPlain


def mixed_mlp(
    hidden: Tensor,  # [n_rows, hidden_size], after the block's norm
    block: MlpBlock,
    routed: Sequence[RoutedRows],  # one per routed adapter of the step; rows are disjoint
) -> Tensor:
    """Runs the block for every row of the step; the residual is added by the caller.

    A routed adapter changes the block by its experts alone, not by plain factors beside them.
    """
    base = block.gate_up(hidden)  # [n_rows, 2·ff]
    if not routed:
        block.plain_gate_up(hidden, base)
        act = block.activation(base)
        out = block.down(act)
        block.plain_down(act, out)
        return out

    pairs = expand(hidden, routed)
    rows_of_pairs = pair_rows(routed)
    expert_base = base.index_select(0, rows_of_pairs)  # before plain deltas land in ``base``
    block.lora_gate_up(hidden.index_select(0, rows_of_pairs), pairs.unweighted, expert_base)
    expert_act = block.activation(expert_base)  # [n_pairs, ff]

    if routed[0].rows.shape[0] == hidden.shape[0]:  # one adapter has every row
        act = _weighted_sum(expert_act, pairs.weights[0], routed[0]).to(expert_act.dtype)
        out = block.down(act)
    else:
        block.plain_gate_up(hidden, base)
        act = block.activation(base)  # [n_rows, ff]; routed rows are overwritten now
        _mix_into(act, expert_act, pairs, routed)
        out = block.down(act)
        block.plain_down(act, out)
    _add_expert_down(out, expert_act, block, pairs, routed)
    return out


def _mix_into(act: Tensor, expert_act: Tensor, pairs: Pairs, routed: Sequence[RoutedRows]) -> None:
    first = 0
    for r, weight in zip(routed, pairs.weights, strict=True):
        n_pairs = r.pair_rows.shape[0]
        mixed = _weighted_sum(expert_act[first : first + n_pairs], weight, r)
        act.index_copy_(0, r.rows, mixed.to(act.dtype))
        first += n_pairs


def _add_expert_down(
    out: Tensor,
    expert_act: Tensor,
    block: MlpBlock,
    pairs: Pairs,
    routed: Sequence[RoutedRows],
) -> None:
    """Adds Σ w_e B A a_e; experts that scale their output need a base product of their own."""
    shared = all(r.shared_down for r in routed)
    if shared:
        delta = out.new_zeros(expert_act.shape[0], out.shape[1])
        block.lora_down(expert_act, pairs.segments, delta)
    else:
        delta = block.down(expert_act)
        block.lora_down(expert_act, pairs.unweighted, delta)
    first = 0
    for r, weight in zip(routed, pairs.weights, strict=True):
        n_pairs = r.pair_rows.shape[0]
        part = delta[first : first + n_pairs]
        if not shared:
            out.index_copy_(0, r.rows, _weighted_sum(part, weight, r).to(out.dtype))
        elif weight.shape[0] == out.shape[0]:
            for slot in part.view(*weight.shape, -1).unbind(1):  # quicker than a sum over slots
                out += slot
        else:
            # Rows are distinct, so this adds each once: no order to lose.
            out.index_add_(0, r.rows, part.view(*weight.shape, -1).sum(dim=1))
        first += n_pairs


def _weighted_sum(values: Tensor, weight: Tensor, routed: RoutedRows) -> Tensor:
    """Σ_slot weight · value, in slot order: [n, width], in float32 or the dtype of ``values``."""
    n_rows, k = weight.shape
    slots = values.view(n_rows, k, -1)
    if k == 2 and routed.strategy is GateStrategy.TOP_K:  # the usual case in one pass: Σ w = 1
        return torch.lerp(slots[:, 0], slots[:, 1], weight[:, 1:].to(values.dtype))
    mixed = slots[:, 0] * weight[:, :1]
    for slot in range(1, k):
        mixed = torch.addcmul(mixed, slots[:, slot], weight[:, slot : slot + 1])
    return mixed
