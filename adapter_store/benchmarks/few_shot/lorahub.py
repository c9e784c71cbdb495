"""LoraHub (Huang et al. 2023): weights of library experts, found without gradients on k examples.

As in the official code: 20 experts drawn at random, weights from 0 within ±1.5, 40 tries, loss plus
0.05 times the mean size of the weights. Its search is Nevergrad's NGOpt; here it is a (1+1)
evolution strategy with the one-fifth rule. It weights A and B apart; with one A for all experts,
as here, weighting B is weighting ΔW.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["HubSearch", "search_weights"]

N_EXPERTS, N_TRIES = 20, 40
_BOUND, _PENALTY = 1.5, 0.05
_GROW = 2.0 ** (1 / 2)  # of the step after a better try; a fourth root of it back after a worse


class HubSearch(NamedTuple):
    experts: Tensor  # int64 [n]: which of the library
    weights: Tensor  # float32 [n]
    loss: float
    n_tries: int


def search_weights(
    loss: Callable[[Tensor, Tensor], float],
    n_library: int,
    *,
    seed: int,
    deadline: float = math.inf,
    n_tries: int = N_TRIES,
) -> HubSearch:
    """`loss(experts, weights)` of the examples. With a finite deadline it tries until then."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randperm(n_library, generator=generator)[:N_EXPERTS]

    def scored(weights: Tensor) -> float:
        return loss(experts, weights) + _PENALTY * float(weights.abs().mean())

    best = torch.zeros(len(experts))
    lowest, step, n = scored(best), 0.3, 1
    while n < n_tries if math.isinf(deadline) else time.monotonic() < deadline:
        noise = torch.randn(len(experts), generator=generator)
        tried = (best + step * noise).clamp(-_BOUND, _BOUND)
        found = scored(tried)
        n += 1
        if found < lowest:
            best, lowest, step = tried, found, step * _GROW
        else:
            step /= _GROW**0.25
    return HubSearch(experts, best, lowest, n)
