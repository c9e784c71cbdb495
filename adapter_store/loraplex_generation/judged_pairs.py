"""Pairs of prompt and answer that copies of an adapter learn from, and by which they are judged."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from .frozen_base import FrozenBase, LoraFA
from .known_rows import KnownRows
from .layout import AdapterLayout
from .packing import TOKENS_AT_ONCE, Row, in_parts
from .scoring import TaskScore, mean_nll_per_group, score_groups

__all__ = ["HeldOut", "JudgedPairs", "folds", "judging"]

_CONFIRMING = 4  # pairs: fewer are right under one of many adapters by chance
_HALVES_BELOW = 8  # pairs: each half judges the other's copy; from there a quarter judges alone


class HeldOut(NamedTuple):
    """On pairs that what is scored was not trained on."""

    nll: float  # nats per answer token
    exact: int  # answers that greedy decoding gives
    n: int

    def beats(self, other: HeldOut, least_gain: float = 0.0) -> bool:
        """More are right, or as many and by more than ``least_gain`` likelier."""
        likelier = self.nll < (1 - least_gain) * other.nll
        return self.exact > other.exact or (self.exact == other.exact and likelier)


class JudgedPairs:
    """The pairs, who sees which of them, and the scores.

    ``base`` may raise TimeoutError in whatever needs a forward.
    """

    def __init__(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        head: Sequence[int],
        rows: Sequence[Row],
        *,
        step_tokens: int,
        judge_tokens: int,
        few_tokens: int,
        seed: int,
    ) -> None:
        """Of rows: `step_tokens` for a copy in a step, `judge_tokens` that a score is taken on,
        `few_tokens` that a start is tried on first.
        """
        if len(rows) < 2:
            raise ValueError("at least two pairs are needed: one to learn from, one to judge by")
        self._base, self._layout = base, layout
        self._known = KnownRows(base, layout.first_layer, head)
        self.n_of_a = layout.full_size - layout.size
        self.folds = folds(len(rows))
        rng = random.Random(seed)
        seen = [[r for i, r in enumerate(rows) if i not in fold] for fold in self.folds]
        self._rotations = [  # the last sees all
            _Rotation(part, step_tokens, rng) for part in (*seen, rows)
        ]
        self._hidden = [[rows[i] for i in judging(rows, fold, judge_tokens)] for fold in self.folds]
        self._n_pairs = len(rows)
        self._judged = _fitting(rows, judge_tokens, rng)
        self._n_few = _n_fitting(self._judged, few_tokens)

    @property
    def may_confirm(self) -> bool:
        """Whether enough of the pairs are scored to tell one of many adapters by."""
        return len(self._judged) >= _CONFIRMING

    def are_right(self, score: TaskScore) -> bool:
        """Whether the pairs that are scored say so of all: they are all, or enough."""
        return all(score.right) and (self.may_confirm or len(self._judged) == self._n_pairs)

    def score(self, start: Tensor) -> TaskScore:
        """On all pairs, or as many as are judged by."""
        return self._score(self._judged, start)

    def may_be_right(self, start: Tensor) -> bool:
        """Whether it gets a few of the pairs right: cheaper than `score`."""
        return all(self._score(self._judged[: self._n_few], start).right)

    def loss(self, copies: Tensor, first: int) -> Tensor:
        """Sum over the copies from the `first` on of the mean NLL of the pairs each sees now."""
        batch, below = self._known.batch([rotation.next() for rotation in self._rotations[first:]])
        adapters = LoraFA(self._layout, copies[first:], self._base.dtype)
        return mean_nll_per_group(self._base.score(batch, adapters, below).nll, batch).sum()

    def held_out_of(self, start: Tensor) -> HeldOut:
        return self.held_out(start.expand(len(self.folds), -1))

    def held_out(self, copies: Tensor) -> HeldOut:
        """Of ``copies`` [n_folds, size], each on its own fold."""
        scores = [self._score(rows, copy) for rows, copy in zip(self._hidden, copies, strict=True)]
        right = [hit for score in scores for hit in score.right]
        return HeldOut(sum(score.nll for score in scores) / len(scores), sum(right), len(right))

    def _score(self, rows: Sequence[Row], copy: Tensor) -> TaskScore:
        """In short forwards, since others may be served meanwhile."""
        adapter = LoraFA(self._layout, copy[None], self._base.dtype)
        nll = 0.0
        right: list[bool] = []
        for part in in_parts(rows, TOKENS_AT_ONCE):
            batch, below = self._known.batch([part])
            (score,) = score_groups(self._base, batch, adapter, below)
            nll += score.nll * sum(row.n_answer for row in part)
            right += score.right
        return TaskScore(nll / sum(row.n_answer for row in rows), tuple(right))


class _Rotation:
    """Pairs for one step after another, each once before any comes twice."""

    def __init__(self, rows: Sequence[Row], n_tokens: int, rng: random.Random) -> None:
        self._rows, self._n_tokens, self._rng = rows, n_tokens, rng
        self._waiting: list[Row] = []

    def next(self) -> list[Row]:
        """As many as fit, at least one, none twice."""
        chosen: list[Row] = []
        left = self._n_tokens
        while len(chosen) < len(self._rows):
            if not self._waiting:
                again = [row for row in self._rows if row not in chosen]
                self._waiting = self._rng.sample(again, len(again))
            if chosen and len(self._waiting[-1].tokens) > left:
                break
            chosen.append(self._waiting.pop())
            left -= len(chosen[-1].tokens)
        return chosen


def folds(n: int) -> list[frozenset[int]]:
    """The pairs held out from each copy: each once where there are few, else every fourth."""
    if n < _HALVES_BELOW:
        return [frozenset(range(0, n, 2)), frozenset(range(1, n, 2))]
    return [frozenset(range(0, n, 4))]


def judging(rows: Sequence[Row], fold: Collection[int], n_tokens: int) -> list[int]:
    """Of the pairs of a fold those that it is scored on: the first that fit, at least one."""
    chosen = sorted(fold)
    return chosen[: _n_fitting([rows[i] for i in chosen], n_tokens)]


def _fitting(rows: Sequence[Row], n_tokens: int, rng: random.Random) -> Sequence[Row]:
    """All rows, or as many drawn ones as fit, at least one."""
    if sum(len(row.tokens) for row in rows) <= n_tokens:
        return rows
    drawn = rng.sample(rows, len(rows))
    return drawn[: _n_fitting(drawn, n_tokens)]


def _n_fitting(rows: Sequence[Row], n_tokens: int) -> int:
    """How many of the first rows fit, at least one."""
    totals = accumulate(len(row.tokens) for row in rows)
    return max(1, sum(total <= n_tokens for total in totals))
