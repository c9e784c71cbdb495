"""Losses that keep the experts of a MixLoRA adapter in use, from the gates' logits of one forward.

pooled (as the public code)   N · Σ_e F_e P_e, summed over the k picks; F_e the share of tokens
                              whose j-th pick is e; logits of all layers pooled. k at balance.
argmax (as the paper)         N · Σ_e F_e P_e with F_e the share of tokens whose best expert is
                              e; per layer, then averaged. 1 at balance.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["DEFAULT_COEFFICIENT", "BalanceLoss", "balance_loss"]


class BalanceLoss(Enum):
    POOLED = "pooled"
    ARGMAX = "argmax"
    NONE = "none"


DEFAULT_COEFFICIENT = {BalanceLoss.POOLED: 1e-3, BalanceLoss.ARGMAX: 1e-2, BalanceLoss.NONE: 0.0}


def balance_loss(
    logits: Sequence[Tensor],  # per layer float32 [n_tokens, n_experts]
    kind: BalanceLoss,
    *,
    top_k: int,
    token_mask: Tensor | None = None,  # bool [n_tokens]; False = padding
) -> Tensor:
    """The loss without its coefficient; 0 for NONE."""
    if token_mask is not None:
        logits = [layer[token_mask] for layer in logits]
    if kind is BalanceLoss.NONE:
        return logits[0].new_zeros(())
    if kind is BalanceLoss.POOLED:
        return _product(torch.cat(list(logits)), top_k)
    return torch.stack([_product(layer, 1) for layer in logits]).mean()


def _product(logits: Tensor, n_picks: int) -> Tensor:
    n_experts = logits.shape[-1]
    p = torch.softmax(logits, dim=-1)
    picks = p.topk(n_picks, dim=-1).indices  # [n, n_picks]
    shares = one_hot(picks, n_experts).float().mean(dim=0)  # [n_picks, n_experts]
    return n_experts * (shares * p.mean(dim=0)).sum()
