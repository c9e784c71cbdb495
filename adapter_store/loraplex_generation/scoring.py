"""How well adapters do on tasks: answer likelihood and exact match, many adapters in one forward.

A reply under greedy decoding equals the answer exactly when every answer token, the end included,
is the most likely one given those before it; so one teacher-forced forward gives both numbers.
The server has a scorer that decodes through its engine instead: ``ServedScorer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .arrow import ArrowExperts
from .frozen_base import Adapters, FrozenBase, LoraFA
from .layout import AdapterLayout
from .packing import PackedBatch, Row, pack

__all__ = ["Scorer", "TaskScore", "TeacherForced", "mean_nll_per_group", "score_groups"]

_GROUP = 4  # adapters per forward


class TaskScore(NamedTuple):
    nll: float  # nats per answer token
    right: tuple[bool, ...]  # per row: greedy decoding gives the answer

    @property
    def exact(self) -> float:
        return sum(self.right) / len(self.right)


class Scorer(Protocol):
    def __call__(self, groups: Sequence[Sequence[Row]], vectors: Tensor | None) -> list[TaskScore]:
        """One score per group of rows, under its row of `vectors` [n_groups, size], or the base."""

    def arrow(self, groups: Sequence[Sequence[Row]], experts: Tensor) -> list[TaskScore]:
        """The same with every token routed over `experts` [n_experts, size] by Arrow."""


class TeacherForced:
    """Scores in the training's own forward."""

    def __init__(self, base: FrozenBase, head: Sequence[int], layout: AdapterLayout) -> None:
        """`head`: the tokens that every chat begins with."""
        self._base, self._head, self._layout = base, head, layout

    def __call__(self, groups: Sequence[Sequence[Row]], vectors: Tensor | None) -> list[TaskScore]:
        scores: list[TaskScore] = []
        for at in range(0, len(groups), _GROUP):
            part = slice(at, at + _GROUP)
            adapters = None
            if vectors is not None:
                adapters = LoraFA(self._layout, vectors[part], self._base.dtype)
            scores += self._under(adapters, groups[part])
        return scores

    def arrow(self, groups: Sequence[Sequence[Row]], experts: Tensor) -> list[TaskScore]:
        routed = ArrowExperts(self._layout, experts, self._base.dtype)
        scores: list[TaskScore] = []
        for at in range(0, len(groups), _GROUP):
            scores += self._under(routed, groups[at : at + _GROUP])
        return scores

    def _under(self, adapters: Adapters | None, groups: Sequence[Sequence[Row]]) -> list[TaskScore]:
        """All groups in one forward."""
        return score_groups(self._base, pack(self._head, groups), adapters)


@torch.inference_mode()
def score_groups(
    base: FrozenBase,
    batch: PackedBatch,
    adapters: Adapters | None = None,
    below: Tensor | None = None,
) -> list[TaskScore]:
    """One score per group of the batch; `below` as `FrozenBase.score` takes it."""
    nll, hit = base.score(batch, adapters, below)
    n = len(batch.tokens)
    owner = batch.adapter[batch.row]
    total = torch.zeros(n).index_add_(0, owner, nll)
    tokens = torch.bincount(owner, minlength=n)
    misses = torch.zeros(len(batch.adapter)).index_add_(0, batch.row, (~hit).float())
    return [
        TaskScore(float(total[g] / tokens[g]), tuple((misses[batch.adapter == g] == 0).tolist()))
        for g in range(n)
    ]


def mean_nll_per_group(nll: Tensor, batch: PackedBatch) -> Tensor:
    """[n_adapters], differentiable: the training loss of each adapter."""
    n = len(batch.tokens)
    owner = batch.adapter[batch.row]
    counts = torch.bincount(owner, minlength=n)
    return torch.zeros(n).index_add_(0, owner, nll) / counts
