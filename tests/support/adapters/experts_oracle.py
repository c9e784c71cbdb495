"""Routed experts written out from the formulas, one row and one expert at a time, in float32.

Nothing here is shared with the package under test: gates, loops and products are spelled again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LowRank = tuple[Tensor, Tensor]  # b [out, rank] with the scale folded in, a [rank, in]


@dataclass
class OracleExpert:
    gate: LowRank | None = None
    up: LowRank | None = None
    down: LowRank | None = None


@dataclass
class OracleAdapter:
    """An adapter of one MLP: a plain LoRA (``plain``), or experts with a gate."""

    plain: OracleExpert = field(default_factory=OracleExpert)
    experts: Sequence[OracleExpert] = ()
    gate: Tensor | None = None  # [n_experts, hidden]
    strategy: str = "mixlora"
    top_k: int = 2
    top_p: float = 0.8


def gate_weights(logits: Tensor, strategy: str, top_k: int, top_p: float) -> dict[int, float]:
    """Return the experts' weights for one row, in plain Python."""
    p = torch.softmax(logits.double(), 0).tolist()
    ranked = sorted(range(len(p)), key=lambda e: (-p[e], e))
    if strategy == "mixlora":
        kept = ranked[:top_k]
        return {e: p[e] / sum(p[j] for j in kept) for e in kept}
    if strategy == "mixlora-dynamic":
        kept, total = [], 0.0
        for e in ranked:
            kept.append(e)
            total += p[e]
            if total > top_p:
                break
        return {e: p[e] for e in kept}
    if strategy == "mixlora-switch":
        return {ranked[0]: p[ranked[0]]}
    if strategy == "loramoe":
        return dict(enumerate(p))
    if strategy == "arrow":
        scores = logits.double().abs().tolist()
        kept = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]
        soft = torch.softmax(torch.tensor([scores[e] for e in kept]).double(), 0).tolist()
        return dict(zip(kept, soft, strict=True))
    raise AssertionError(strategy)


def low_rank(x: Tensor, factors: LowRank | None, width: int) -> Tensor:
    if factors is None:
        return torch.zeros(width)
    b, a = factors
    return b @ (a @ x)


def expert_mlp(
    h: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    expert: OracleExpert,
    act: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
) -> Tensor:
    """Return E_e(h) as published: each expert has its own down product."""
    w_gate, w_up, w_down = weights
    g = w_gate @ h + low_rank(h, expert.gate, w_gate.shape[0])
    u = w_up @ h + low_rank(h, expert.up, w_up.shape[0])
    a = act(g) * u
    return w_down @ a + low_rank(a, expert.down, w_down.shape[0])


def adapter_mlp(
    h: Tensor, weights: tuple[Tensor, Tensor, Tensor], adapter: OracleAdapter | None
) -> Tensor:
    """Run one row through a layer's MLP under an adapter (None is the base)."""
    if adapter is None:
        return expert_mlp(h, weights, OracleExpert())
    if adapter.gate is None:
        return expert_mlp(h, weights, adapter.plain)
    chosen = gate_weights(adapter.gate @ h, adapter.strategy, adapter.top_k, adapter.top_p)
    out = torch.zeros(weights[2].shape[0])
    for e, w in chosen.items():
        out = out + w * expert_mlp(h, weights, adapter.experts[e])
    return out
