"""From a draft and a few pairs of prompt and answer to an adapter that does the task.

starts ──► one that gets all pairs right, else the better of the first two
            │  copies: one for each fold of held-out pairs, and one that sees every pair
            ▼
        the span of the library (tens of coefficients), then all of B and A; every few steps each
        fold's copy is scored on the pairs it has not seen, and at last on parts of its way, too
            ▼
        better than the start anywhere?  the copy that saw all goes on alone to the end, and then
                                         back to the part of its way that was best
        nowhere?                         the start

The copies train side by side in one forward, and once the judges have said yes, all the time that
is left goes to the copy that is kept. Going back a part of the way is WiSE-FT (Wortsman et al.,
2022): a few pairs lead further than they know.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .errors import OutOfTime
from .frozen_base import FrozenBase, LoraFA
from .known_rows import KnownRows
from .layout import AdapterLayout
from .library import Subspace
from .packing import TOKENS_AT_ONCE, Row, in_parts
from .row_adam import RowAdam
from .scoring import TaskScore, mean_nll_per_group, score_groups

__all__ = [
    "HeldOut",
    "Progress",
    "Refinement",
    "RefinementProgress",
    "RefinementRecipe",
    "folds",
    "judging",
    "refine",
]

_MARGIN = 1.2  # of the time that a step and the looks after it took so far
_HALVES_BELOW = 8  # pairs: each half judges the other's copy; from there a quarter judges alone


@dataclass(frozen=True, slots=True)
class RefinementRecipe:
    """Compared on validation tasks: `python -m adapter_store.benchmarks.few_shot sweep`."""

    span_steps: int = 4
    span_lr: float = 0.3
    steps: int = 72  # of B and A, after the span
    lr: float = 3e-3
    a_rate: float = 0.3  # of A, as a part of `lr`; 0: A stays as it is in the library
    warmup: int = 4
    judged_steps: int = 20  # of the span's and these, beside the copies that judge
    look_every: int = 4  # steps of B and A
    shorter_ways: tuple[float, ...] = (0.5, 0.25)  # of the one from the start to what was trained
    least_gain: float = 0.05  # of the held-out NLL, below which the start is kept
    shorter_gain: float = 0.3  # the same, below which a shorter way is not taken
    tokens: int = 112  # of rows for a copy in a step, in turn
    judge_tokens: int = 1024  # of rows that a score is taken on: bounds time and memory
    choose_tokens: int = 128  # of rows that further starts are tried on first
    choosing_share: float = 0.1  # of the time, in which further starts are tried
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return self.span_steps + self.steps


class RefinementProgress(NamedTuple):
    stage: str  # "judging turns" (``from_examples``), "choosing a start", "training"
    step: int  # done
    n_steps: int
    held_out_nll: float | None  # of the best look so far; None: not looked yet


Progress = Callable[[RefinementProgress], None]


def _unheard(progress: RefinementProgress) -> None:
    pass


class HeldOut(NamedTuple):
    """On pairs that what is scored was not trained on."""

    nll: float  # nats per answer token
    exact: int  # answers that greedy decoding gives
    n: int


@dataclass(frozen=True, slots=True)
class Refinement:
    vector: Tensor  # float32 [layout.size], or [layout.full_size] where A has moved
    start: str  # which start was taken
    before: HeldOut  # of the first of the starts
    after: HeldOut  # of the start that was taken, or of the judges at their best where they gained
    steps: int  # 0: the start is kept
    n_steps: int  # that it would have had
    timed_out: bool  # the deadline ended it: with more time it may become another
    seconds: float
    start_is_right: bool = False  # for every pair, so that nothing was trained
    way: float = 0.0  # share of the one from the start to what was trained that is kept

    @property
    def gained(self) -> bool:
        """By training."""
        return self.steps > 0


def refine(
    base: FrozenBase,
    layout: AdapterLayout,
    span: Subspace,
    head: Sequence[int],
    rows: Sequence[Row],
    starts: Mapping[str, Tensor],
    *,
    recipe: RefinementRecipe = RefinementRecipe(),
    deadline: float = math.inf,
    report: Progress = _unheard,
) -> Refinement:
    """``rows``: two or more pairs; ``starts`` [layout.size] each: the first is what the result is
    compared with, and those after the second are taken only where they get every pair right. These
    are tried as long as there is time. Deterministic but for time.

    A start that answers every pair right is kept: a few pairs would teach it their own words only.

    ``deadline``, of ``time.monotonic``: a step that would not be done and judged by then is not
    begun, and the rate falls as time runs out. ``base`` may raise TimeoutError then: the step that
    it cuts off is none. Raises OutOfTime where that is before the first look. ``report`` is called
    before each start, step and look; what it raises ends the work. ``head``: tokens that every chat
    begins with.
    """
    began = time.monotonic()
    pace = _Pace(began, deadline)

    def tell(stage: str, step: int, nll: float | None) -> None:
        report(RefinementProgress(stage, step, recipe.n_steps, nll))

    try:
        task = _Task(base, layout, head, rows, recipe)
        chosen = _choose(task, starts, recipe, pace, lambda: tell("choosing a start", 0, None))
    except TimeoutError:
        raise OutOfTime from None
    made = Refinement(
        chosen.vector,
        chosen.name,
        chosen.before,
        chosen.score,
        0,
        recipe.n_steps,
        timed_out=False,
        seconds=0.0,
        start_is_right=chosen.is_right,
    )
    if not chosen.is_right:
        copies = _Copies(task, span, chosen.vector, recipe, pace)
        best = _Best(chosen, recipe)
        has_judged = _judge(task, copies, best, recipe, pace, tell)
        made = replace(made, timed_out=not (has_judged and chosen.has_tried_all))
        if best.gained:
            _finish(copies, best, recipe, pace, tell)
            made = replace(
                made,
                vector=copies.kept(best.way),
                after=best.score,
                steps=copies.step,
                timed_out=not has_judged or copies.step < recipe.n_steps,
                way=best.way,
            )
    return replace(made, seconds=time.monotonic() - began)


class _Chosen(NamedTuple):
    """A start."""

    name: str
    vector: Tensor  # float32 [layout.size]
    before: HeldOut  # of the first start
    score: HeldOut  # of this one
    is_right: bool  # for all pairs
    has_tried_all: bool


def _choose(
    task: _Task,
    starts: Mapping[str, Tensor],
    recipe: RefinementRecipe,
    pace: _Pace,
    tell: Callable[[], None],
) -> _Chosen:
    """One that gets all pairs right, else of the first two the one that gets more, then the
    likelier. A third start that gets some of them right says little: of many, one always does.
    """
    names = iter(starts)
    known = next(names)
    tell()
    with pace.look():
        before = task.held_out_of(starts[known])
    name, score = known, task.score(starts[known])
    has_tried_all = True
    for n_tried, other in enumerate(names, start=1):
        if all(score.right):
            break
        if n_tried > 1 and pace.spent > recipe.choosing_share:
            has_tried_all = False
            break
        tell()
        if n_tried > 1 and not task.may_be_right(starts[other]):
            continue
        found = task.score(starts[other])
        if all(found.right) or (n_tried == 1 and _rank(found) > _rank(score)):
            name, score = other, found
    held_out = before if name == known else task.held_out_of(starts[name])
    return _Chosen(name, starts[name], before, held_out, all(score.right), has_tried_all)


def _judge(
    task: _Task,
    copies: _Copies,
    best: _Best,
    recipe: RefinementRecipe,
    pace: _Pace,
    tell: Callable[[str, int, float | None], None],
) -> bool:
    """The steps beside the copies that judge, and their looks. Whether there was time for all."""
    n_judged = min(recipe.judged_steps, recipe.n_steps)
    tell("training", 0, best.score.nll)
    with suppress(TimeoutError):
        while copies.step < n_judged and pace.allows_a_step(2 + len(recipe.shorter_ways)):
            copies.advance()
            after_span = copies.step - recipe.span_steps  # in it, looks say nothing of B and A
            if after_span > 0 and after_span % recipe.look_every == 0 and copies.step < n_judged:
                with pace.look():
                    best.look(task.held_out(copies.judges()))
            tell("training", copies.step, best.score.nll)
        n_done = copies.step
        for way in (1.0, *recipe.shorter_ways) if n_done else ():
            best.look_back(task.held_out(copies.judges(way)), way)
            tell("training", n_done, best.score.nll)
        return n_done == n_judged
    return False


def _finish(
    copies: _Copies,
    best: _Best,
    recipe: RefinementRecipe,
    pace: _Pace,
    tell: Callable[[str, int, float | None], None],
) -> None:
    """The other steps, of the copy that is kept."""
    copies.dismiss_judges()
    with suppress(TimeoutError):
        while copies.step < recipe.n_steps and pace.allows_a_step():
            copies.advance()
            tell("training", copies.step, best.score.nll)


def _rank(score: TaskScore) -> tuple[int, float]:
    return sum(score.right), -score.nll


class _Pace:
    """Whether there is time for a step, and for looks at what it gave, by the longest so far."""

    def __init__(self, began: float, deadline: float) -> None:
        self._began, self._deadline = began, deadline
        self._step_s = self._look_s = 0.0

    @property
    def spent(self) -> float:
        """Share of the time that there is."""
        return (time.monotonic() - self._began) / max(self._deadline - self._began, 1e-9)

    def allows_a_step(self, n_looks: int = 0) -> bool:
        needed = self._step_s + n_looks * self._look_s
        return time.monotonic() + _MARGIN * needed < self._deadline

    @contextmanager
    def step(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._step_s = max(self._step_s, time.monotonic() - began)

    @contextmanager
    def look(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._look_s = max(self._look_s, time.monotonic() - began)


class _Task:
    """The pairs, who sees which of them, and the scores."""

    def __init__(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        head: Sequence[int],
        rows: Sequence[Row],
        recipe: RefinementRecipe,
    ) -> None:
        if len(rows) < 2:
            raise ValueError("at least two pairs are needed: one to learn from, one to judge by")
        self._base, self._layout = base, layout
        self._known = KnownRows(base, layout.first_layer, head)
        self.n_of_a = layout.full_size - layout.size
        self.folds = folds(len(rows))
        rng = random.Random(recipe.seed)
        seen = [[r for i, r in enumerate(rows) if i not in fold] for fold in self.folds]
        self._turns = [_Turns(part, recipe.tokens, rng) for part in (*seen, rows)]  # last: sees all
        self._hidden = [
            [rows[i] for i in judging(rows, fold, recipe.judge_tokens)] for fold in self.folds
        ]
        self._judged = _fitting(rows, recipe.judge_tokens, rng)
        self._n_tried = _n_fitting(self._judged, recipe.choose_tokens)

    def score(self, start: Tensor) -> TaskScore:
        """On all pairs, or as many as are judged by."""
        return self._score(self._judged, start)

    def may_be_right(self, start: Tensor) -> bool:
        """For a few of the pairs it is."""
        return all(self._score(self._judged[: self._n_tried], start).right)

    def loss(self, copies: Tensor, first: int) -> Tensor:
        """Sum over the copies from the `first` on of the mean NLL of the pairs each sees now."""
        batch, below = self._known.batch([turns.next() for turns in self._turns[first:]])
        adapters = LoraFA(self._layout, copies[first:], self._base.dtype)
        return mean_nll_per_group(self._base.score(batch, adapters, below).nll, batch).sum()

    def held_out_of(self, start: Tensor) -> HeldOut:
        return self.held_out(start.expand(len(self.folds), -1))

    def held_out(self, copies: Tensor) -> HeldOut:
        """``copies`` [n_folds, size], each on its own fold."""
        scores = self._scores(self._hidden, copies)
        right = [hit for score in scores for hit in score.right]
        return HeldOut(sum(score.nll for score in scores) / len(scores), sum(right), len(right))

    def _scores(self, groups: Sequence[Sequence[Row]], copies: Tensor) -> list[TaskScore]:
        return [self._score(rows, copy) for rows, copy in zip(groups, copies, strict=True)]

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


class _Turns:
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


class _Best:
    """Whether the judges ever beat both starts, and how much of their way is best.

    Better is: more are right, or as many and likelier.
    """

    def __init__(self, chosen: _Chosen, recipe: RefinementRecipe) -> None:
        self.score, self.gained, self.way = chosen.score, False, 1.0
        self._before, self._recipe = chosen.before, recipe
        self._score_of_way: HeldOut | None = None

    def look(self, score: HeldOut) -> None:
        least_gain = 0.0 if self.gained else self._recipe.least_gain
        if _is_better(score, self.score, least_gain) and _is_better(score, self._before, 0.0):
            self.score, self.gained = score, True

    def look_back(self, score: HeldOut, way: float) -> None:
        """The whole way first: a shorter one has to be clearly better."""
        self.look(score)
        known = self._score_of_way
        if known is None or _is_better(score, known, self._recipe.shorter_gain):
            self._score_of_way, self.way = score, way


def _is_better(score: HeldOut, other: HeldOut, least_gain: float) -> bool:
    likelier = score.nll < (1 - least_gain) * other.nll
    return score.exact > other.exact or (score.exact == other.exact and likelier)


class _Copies:
    """Adapters that train side by side, one for each fold and one that sees every pair."""

    def __init__(
        self, task: _Task, span: Subspace, start: Tensor, recipe: RefinementRecipe, pace: _Pace
    ) -> None:
        self._task, self._span = task, span
        self._recipe, self._pace = recipe, pace
        n = len(task.folds) + 1
        self._first = 0  # of those that still train
        self._in_span = RowAdam(torch.zeros(n, span.size))
        self._adam: RowAdam | None = None  # of B and A
        self._start = start
        self._from = start.expand(n, -1)  # [n, size or full_size], where it began
        self._units = torch.ones(start.shape)  # of its numbers
        self.step = 0

    def judges(self, way: float = 1.0) -> Tensor:
        """[n_folds, size or full_size], at ``way`` from the start to what was trained."""
        return self._interpolated(way)[:-1]

    def kept(self, way: float) -> Tensor:
        """[size or full_size], of the copy that sees every pair; a tensor of its own."""
        return self._interpolated(way)[-1].clone()

    def _interpolated(self, way: float) -> Tensor:
        vectors = self._vectors()
        start = F.pad(self._start, (0, vectors.shape[1] - len(self._start)))
        return start + way * (vectors - start)

    def dismiss_judges(self) -> None:
        self._first = len(self._task.folds)

    def advance(self) -> None:
        """One step, of the span's coefficients first, then of B and A."""
        recipe = self._recipe
        with self._pace.step():
            if self.step < recipe.span_steps:
                rate = recipe.span_lr * _falling(self.step / recipe.span_steps)
                self._descend(self._in_span, rate * min(1.0, (self.step + 1) / recipe.warmup))
            else:
                self._adam = self._adam or self._leave_span()
                at = self.step - recipe.span_steps
                rate = recipe.lr * _falling(max(at / recipe.steps, self._pace.spent))
                self._descend(self._adam, rate * min(1.0, (at + 1) / recipe.warmup))
        self.step += 1

    def _descend(self, adam: RowAdam, rate: float) -> None:
        rows = adam.rows.clone().requires_grad_()
        torch.autograd.backward(self._task.loss(self._moved(rows), self._first))
        assert rows.grad is not None
        adam.step(rows.grad, torch.arange(self._first, len(rows)), lr=rate)

    def _leave_span(self) -> RowAdam:
        n_moved = self._task.n_of_a if self._recipe.a_rate else 0
        self._from = F.pad(self._vectors(), (0, n_moved))
        self._units = F.pad(self._units, (0, n_moved), value=self._recipe.a_rate)
        return RowAdam(torch.zeros_like(self._from))

    def _vectors(self) -> Tensor:
        return self._moved((self._adam or self._in_span).rows)

    def _moved(self, rows: Tensor) -> Tensor:
        """``rows`` [n, span.size] before the span is left, [n, size or full_size] after."""
        if self._adam is None:
            return self._from + rows @ self._span.directions
        return self._from + rows * self._units


def _falling(share: float) -> float:
    """A cosine down to a tenth."""
    return 0.55 + 0.45 * math.cos(math.pi * min(share, 1.0))


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
