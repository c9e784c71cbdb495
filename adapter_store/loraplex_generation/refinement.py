"""From a draft and a few pairs of prompt and answer to an adapter that does the task.

starts ──► one that gets all pairs right, as it is; else the better of the first two
            │  copies: one for each fold of held-out pairs, and one that sees every pair
            ▼
        the span of the library (tens of coefficients), then all of B and A; every few steps each
        fold's copy is scored on the pairs it has not seen, and at last on parts of its way, too
            ▼
        better than that start, and than the first, anywhere?
                  the copy that saw all goes on alone to the end, and then back to the part of its
                  way that was best
        nowhere?  the start

The copies train side by side in one forward, and once the judges have said yes, all the time that
is left goes to the copy that is kept. Going back a part of the way is WiSE-FT (Wortsman et al.,
2022): a few pairs lead further than they know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .errors import OutOfTime
from .frozen_base import FrozenBase
from .judged_pairs import HeldOut, JudgedPairs
from .layout import AdapterLayout
from .library import Subspace
from .packing import Row
from .row_adam import RowAdam
from .scoring import TaskScore

__all__ = ["Progress", "Refinement", "RefinementProgress", "RefinementRecipe", "refine"]

_MARGIN = 1.2  # of the time that a step and the looks after it took so far


@dataclass(frozen=True, slots=True)
class RefinementRecipe:
    """Rates and steps were compared on validation tasks (`python -m
    adapter_store.benchmarks.few_shot sweep`), starts and ways in probes
    (docs/generated-adapters-method.md).
    """

    span_steps: int = 4
    span_lr: float = 0.3
    steps: int = 72  # of B and A, after the span
    lr: float = 3e-3
    a_rate: float = 0.3  # of A, as a part of `lr`; 0: A stays as it is in the library
    warmup: int = 4
    judged_steps: int = 20  # of the span's and these, beside the copies that judge
    look_every: int = 4  # steps of B and A
    shorter_ways: tuple[float, ...] = (0.5, 0.25)  # parts of what training changed: WiSE-FT's α
    least_gain: float = 0.05  # of the held-out NLL, below which the start is kept
    shorter_gain: float = 0.3  # the same, below which a shorter way is not taken
    tokens: int = 112  # of rows for a copy in a step, in turn
    judge_tokens: int = 1024  # of rows that a score is taken on: bounds time and memory
    few_tokens: int = 128  # of rows that a start after the second is tried on first
    choosing_share: float = 0.1  # of the time, in which these are tried
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


@dataclass(frozen=True, slots=True)
class Refinement:
    vector: Tensor  # float32 [layout.size], or [layout.full_size] where A has moved
    start: str  # which start was taken
    before: HeldOut  # of the first of the starts
    after: HeldOut  # of the start that was taken, or of the judges at their best where they gained
    steps: int  # 0: the start is kept
    n_steps: int  # that it would have had
    timed_out: bool  # something was left out: with more time it may become another
    seconds: float
    start_is_right: bool = False  # for every pair, so that nothing was trained
    way: float = 0.0  # how much of what training changed is kept: WiSE-FT's α

    @property
    def gained(self) -> bool:
        """By training. On a card another reading is a gain, too."""
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
    compared with, and those after the second are taken only where they get every pair right, of
    four or more. None of these is begun once they have taken a share of the time. Deterministic but
    for time.

    A start that answers every pair right is kept: a few pairs would teach it their own words only.

    ``deadline``, of ``time.monotonic``: a step that would not be done and judged by then is not
    begun, and the rate falls as time runs out. ``base`` may raise TimeoutError then: the step that
    it cuts off is none. Raises OutOfTime where that is before the first start is known. ``report``
    is called before each start, step and look; what it raises ends the work. ``head``: tokens that
    every chat begins with.
    """
    began = time.monotonic()
    pace = _Pace(began, deadline)

    def tell(stage: str, step: int, nll: float | None) -> None:
        report(RefinementProgress(stage, step, recipe.n_steps, nll))

    try:
        task = JudgedPairs(
            base,
            layout,
            head,
            rows,
            step_tokens=recipe.tokens,
            judge_tokens=recipe.judge_tokens,
            few_tokens=recipe.few_tokens,
            seed=recipe.seed,
        )
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
        is_whole = has_judged and chosen.has_tried_all
        made = replace(made, timed_out=not is_whole)
        if best.gained:
            _finish(copies, best, recipe, pace, tell)
            made = replace(
                made,
                vector=copies.kept(best.way),
                after=best.score,
                steps=copies.step,
                timed_out=not is_whole or copies.step < recipe.n_steps,
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
    task: JudgedPairs,
    starts: Mapping[str, Tensor],
    recipe: RefinementRecipe,
    pace: _Pace,
    tell: Callable[[], None],
) -> _Chosen:
    """One that gets all pairs right, else of the first two the one that gets more, then the
    likelier. A third start that gets some of them right says little: of many, one always does.
    """
    first, *others = starts
    second, further = others[:1], others[1:] if task.may_confirm else []
    tell()
    with pace.look():
        before = task.held_out_of(starts[first])
    name, score, held_out = first, task.score(starts[first]), before
    has_tried_all = False
    with suppress(TimeoutError):
        for other in [] if task.are_right(score) else second:
            tell()
            found = task.score(starts[other])
            if _rank(found) > _rank(score):
                name, score, held_out = other, found, task.held_out_of(starts[other])
        spent = pace.spent
        for other in further:
            if task.are_right(score) or pace.spent - spent > recipe.choosing_share:
                break
            tell()
            if task.may_be_right(starts[other]):
                found = task.score(starts[other])
                if task.are_right(found):
                    name, score, held_out = other, found, task.held_out_of(starts[other])
        else:
            has_tried_all = True
    return _Chosen(name, starts[name], before, held_out, task.are_right(score), has_tried_all)


def _judge(
    task: JudgedPairs,
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


class _Best:
    """Whether the judges ever beat the start that was chosen and the first one, and how much of
    their way is best.
    """

    def __init__(self, chosen: _Chosen, recipe: RefinementRecipe) -> None:
        self.score, self.gained, self.way = chosen.score, False, 1.0
        self._before, self._recipe = chosen.before, recipe
        self._taken: HeldOut | None = None  # score of the way

    def look(self, score: HeldOut) -> None:
        least_gain = 0.0 if self.gained else self._recipe.least_gain
        if score.beats(self.score, least_gain) and score.beats(self._before):
            self.score, self.gained = score, True

    def look_back(self, score: HeldOut, way: float) -> None:
        """The whole way first: a shorter one has to be clearly better."""
        if self._taken is None or score.beats(self._taken, self._recipe.shorter_gain):
            self._taken, self.way = score, way
            self.look(score)


class _Copies:
    """Adapters that train side by side, one for each fold and one that sees every pair."""

    def __init__(
        self,
        task: JudgedPairs,
        span: Subspace,
        start: Tensor,
        recipe: RefinementRecipe,
        pace: _Pace,
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
