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
from dataclasses import dataclass, replace

from torch import Tensor

from loraplex_kernels.experts import Activation, StepPairs, moe_combine, weighted_sum
from loraplex_kernels.layout import LoraSegments

from .expansion import RoutedRows, expand, step_pairs

__all__ = ["AddPlain", "LoraOp", "MlpBlock", "MoeDown", "MoeGateUp", "mixed_mlp"]

# (x, segments, out): adds the segments' low-rank products of x to out in place; storage, target
# and tables of one linear group are bound to it.
LoraOp = Callable[[Tensor, LoraSegments, Tensor], None]
# (x, out): adds what the unrouted adapters of the step make of x; touches no other row.
AddPlain = Callable[[Tensor, Tensor], None]
# ``loraplex_kernels.experts.moe_gate_up`` and ``moe_down`` with the linear and its operator bound
MoeGateUp = Callable[[Activation, Tensor, StepPairs, LoraSegments], tuple[Tensor, Tensor]]
MoeDown = Callable[[Tensor, Tensor, StepPairs, LoraSegments], Tensor]


@dataclass(frozen=True, slots=True)
class MlpBlock:
    """The parts of one layer's MLP, as the model's owner binds them."""

    activation: Activation
    down: Callable[[Tensor], Tensor]  # base product [n, ff] → [n, hidden]
    lora_down: LoraOp
    moe_gate_up: MoeGateUp  # [n, hidden] → [n, 2·ff], gate then up
    moe_down: MoeDown  # [n, ff] → [n, hidden]
    plain_gate_up: AddPlain
    plain_down: AddPlain
    scaled_down: Callable[[Tensor], Tensor]  # [n, ff], as the unrouted adapters scale it


def mixed_mlp(
    hidden: Tensor,  # [n_rows, hidden_size], after the block's norm
    block: MlpBlock,
    routed: Sequence[RoutedRows],  # of each routed adapter of the step, one at least; disjoint rows
) -> Tensor:
    """Runs the block for every row of the step; the residual is added by the caller.

    A routed adapter changes the block by its experts alone, not by plain factors beside them.
    """
    weights, segments = expand(hidden, routed)
    pairs = step_pairs(routed)
    # The pairs' rows are taken before plain deltas land in ``base``.
    base, expert_act = block.moe_gate_up(block.activation, hidden, pairs, segments)
    alone = routed[0].rows.shape[0] == hidden.shape[0]  # one adapter has every row
    if alone:
        act = base.new_empty(base.shape[0], base.shape[1] // 2)
    else:
        block.plain_gate_up(hidden, base)
        act = block.activation(base)  # routed rows are overwritten now
    moe_combine(expert_act, weights, pairs, act)
    act = block.scaled_down(act)
    if all(r.experts.shared_down for r in routed):
        out = block.moe_down(act, expert_act, pairs, segments)
    else:
        out = _down_of_each(act, expert_act, block, pairs, segments, weights)
    if not alone:
        block.plain_down(act, out)
    return out


def _down_of_each(
    act: Tensor,
    expert_act: Tensor,
    block: MlpBlock,
    pairs: StepPairs,
    segments: LoraSegments,
    weights: tuple[Tensor, ...],
) -> Tensor:
    """Experts that scale or shift their output need a base product of their own."""
    out = block.down(act)
    of_pairs = block.down(expert_act)
    block.lora_down(expert_act, replace(segments, weights=None), of_pairs)
    first = 0
    for (rows, _), weight in zip(pairs.groups, weights, strict=True):
        slots = of_pairs[first : first + weight.numel()].view(*weight.shape, -1)
        out.index_copy_(0, rows, weighted_sum(slots, weight).to(out.dtype))
        first += weight.numel()
    return out
