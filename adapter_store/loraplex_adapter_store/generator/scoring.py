"""How well adapters do on tasks: answer likelihood and exact match, many adapters in one forward.

A reply under greedy decoding equals the answer exactly when every answer token, the end included,
is the most likely one given those before it; so one teacher-forced forward gives both numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .frozen_base import Adapters, FrozenBase
from .packing import PackedBatch

__all__ = ["TaskScore", "mean_nll_per_group", "score_groups"]


class TaskScore(NamedTuple):
    nll: float  # nats per answer token
    exact: float  # share of answers that greedy decoding gets right
    n_rows: int


@torch.inference_mode()
def score_groups(
    base: FrozenBase, batch: PackedBatch, adapters: Adapters | None = None
) -> list[TaskScore]:
    """One score per group of the batch."""
    nll, hit = base.score(batch, adapters)
    n = len(batch.tokens)
    owner = batch.adapter[batch.row]
    total = torch.zeros(n).index_add_(0, owner, nll)
    tokens = torch.bincount(owner, minlength=n)
    misses = torch.zeros(len(batch.adapter)).index_add_(0, batch.row, (~hit).float())
    right = torch.zeros(n).index_add_(0, batch.adapter, (misses == 0).float())
    rows = torch.bincount(batch.adapter, minlength=n)
    return [
        TaskScore(float(total[g] / tokens[g]), float(right[g] / rows[g]), int(rows[g]))
        for g in range(n)
    ]


def mean_nll_per_group(nll: Tensor, batch: PackedBatch) -> Tensor:
    """[n_adapters], differentiable: the training loss of each adapter."""
    n = len(batch.tokens)
    owner = batch.adapter[batch.row]
    counts = torch.bincount(owner, minlength=n)
    return torch.zeros(n).index_add_(0, owner, nll) / counts
