"""From a draft and a few pairs of prompt and answer to an adapter that does the task.

starts ──► the likeliest under all pairs
            │  copies: one for each fold of held-out pairs, and one that sees every pair
            ▼
        the span of the library (tens of coefficients), then all of B; every few steps each fold's
        copy is scored on the pairs it has not seen ──► the best step so far
            ▼
        better than the start by that score? the copy that saw all, at that step : the start

The copies train side by side in one forward, so a look costs one more forward, not one more run.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .frozen_base import FrozenBase, LoraFA
from .layout import AdapterLayout
from .library import Subspace
from .packing import Row, pack
from .scoring import TaskScore, mean_nll_per_group, score_groups

__all__ = ["HeldOut", "Progress", "Refinement", "RefinementProgress", "RefinementRecipe", "refine"]

_MARGIN = 1.2  # of the time that a step and a look took so far
_HALVES_BELOW = 8  # pairs: each half judges the other's copy; from there a quarter judges alone


@dataclass(frozen=True, slots=True)
class RefinementRecipe:
    """Compared on validation tasks: `python -m adapter_store.benchmarks.few_shot sweep`."""

    span_steps: int = 4
    span_lr: float = 0.3
    steps: int = 20  # of B, after the span
    lr: float = 3e-3
    warmup: int = 4
    look_every: int = 4
    patience: int = 2  # looks without a better one
    least_gain: float = 0.05  # of the held-out NLL, below which the start is kept
    tokens: int = 224  # of rows for a copy in a step; more are drawn anew each step
    judge_tokens: int = 1024  # of rows that a score is taken on: bounds time and memory
    seed: int = 0


class RefinementProgress(NamedTuple):
    stage: str  # "choosing a start", "training"
    step: int  # done
    n_steps: int
    held_out_nll: float | None  # the best so far; None: not looked yet


Progress = Callable[[RefinementProgress], None]


def _unheard(progress: RefinementProgress) -> None:
    pass


class HeldOut(NamedTuple):
    """On pairs that the scored copies had not seen."""

    nll: float  # nats per answer token
    exact: int  # answers that greedy decoding gives
    n: int


@dataclass(frozen=True, slots=True)
class Refinement:
    vector: Tensor  # float32 [layout.size]
    start: str  # which start was taken
    before: HeldOut  # of the start
    after: HeldOut  # of what is returned; as ``before`` where nothing was gained
    steps: int  # 0: the start is kept
    seconds: float

    @property
    def gained(self) -> bool:
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
    """``rows``: two or more pairs; ``starts`` [layout.size] each. Deterministic but for time.

    ``deadline``, of ``time.monotonic``: a step that would not be done and judged by then is not
    begun. ``report`` is called before the first and after each step; what it raises ends the work.
    ``head``: tokens that every chat begins with.
    """
    began = time.monotonic()
    n_steps = recipe.span_steps + recipe.steps
    report(RefinementProgress("choosing a start", 0, n_steps, None))
    task = _Task(base, layout, head, rows, recipe)
    name, start = task.best_start(starts)
    pace = _Pace(deadline)
    with pace.look():
        best = _Best(task.held_out(start.expand(len(task.folds), -1)), start)
    report(RefinementProgress("training", 0, n_steps, best.score.nll))
    training = _trained(task, span, start, recipe)
    step, looked_at = 0, 0
    copies = start.expand(len(task.folds) + 1, -1)
    while step < n_steps and best.looks_since <= recipe.patience and pace.allows_a_step():
        with pace.step():
            copies = next(training)
        step += 1
        if step == n_steps or step % recipe.look_every == 0:
            with pace.look():
                best.offer(task.held_out(copies[:-1]), copies[-1], step)
            looked_at = step
        report(RefinementProgress("training", step, n_steps, best.score.nll))
    if looked_at < step:
        best.offer(task.held_out(copies[:-1]), copies[-1], step)
    if best.score.nll > (1 - recipe.least_gain) * best.first.nll or best.lost_answers:
        best.reset(start)
    seconds = time.monotonic() - began
    return Refinement(best.vector, name, best.first, best.score, best.step, seconds)


class _Pace:
    """Whether there is time for a step and a look at what it gave, by the longest so far."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._step_s = self._look_s = 0.0

    def allows_a_step(self) -> bool:
        return time.monotonic() + _MARGIN * (self._step_s + 2 * self._look_s) < self._deadline

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
        self._base, self._layout, self._head = base, layout, head
        self._n_tokens = recipe.tokens
        self.folds = _folds(len(rows))
        seen = [[r for i, r in enumerate(rows) if i not in fold] for fold in self.folds]
        self._seen = [*seen, list(rows)]  # the last copy sees all
        rng = random.Random(recipe.seed)
        n_judged = recipe.judge_tokens
        hidden = [[rows[i] for i in sorted(fold)] for fold in self.folds]
        self._hidden = pack(head, [_fitting(part, n_judged, rng) for part in hidden])
        self._judged = _fitting(rows, n_judged, rng)

    def best_start(self, starts: Mapping[str, Tensor]) -> tuple[str, Tensor]:
        """By the likelihood of the pairs: none has been trained on yet."""
        batch = pack(self._head, [self._judged] * len(starts))
        adapters = LoraFA(self._layout, torch.stack(list(starts.values())), self._base.dtype)
        scores = score_groups(self._base, batch, adapters)
        nll = dict(zip(starts, (score.nll for score in scores), strict=True))
        name = min(nll, key=nll.__getitem__)
        return name, starts[name]

    def loss(self, copies: Tensor, rng: random.Random) -> Tensor:
        """Sum over the copies of the mean NLL of the pairs each sees. ``copies`` [n, size]."""
        batch = pack(self._head, [_fitting(rows, self._n_tokens, rng) for rows in self._seen])
        scores = self._base.score(batch, LoraFA(self._layout, copies, self._base.dtype))
        return mean_nll_per_group(scores.nll, batch).sum()

    def held_out(self, copies: Tensor) -> HeldOut:
        """``copies`` [n_folds, size], each on its own fold."""
        adapters = LoraFA(self._layout, copies, self._base.dtype)
        scores: list[TaskScore] = score_groups(self._base, self._hidden, adapters)
        right = [hit for score in scores for hit in score.right]
        return HeldOut(sum(score.nll for score in scores) / len(scores), sum(right), len(right))


class _Best:
    def __init__(self, first: HeldOut, start: Tensor) -> None:
        self.first = first
        self.reset(start)

    def reset(self, start: Tensor) -> None:
        self.score, self.vector, self.step, self.looks_since = self.first, start, 0, 0

    def offer(self, score: HeldOut, vector: Tensor, step: int) -> None:
        self.looks_since += 1
        if score.nll < self.score.nll:
            self.score, self.vector, self.step, self.looks_since = score, vector, step, 0

    @property
    def lost_answers(self) -> bool:
        return self.score.exact < self.first.exact


def _trained(
    task: _Task, span: Subspace, start: Tensor, recipe: RefinementRecipe
) -> Iterator[Tensor]:
    """The copies [n_folds + 1, size] after each step, as new tensors."""
    rng = random.Random(recipe.seed)
    n = len(task.folds) + 1
    t = torch.zeros(n, span.size, requires_grad=True)
    copies = start.expand(n, -1)
    for _ in _descent(
        t,
        lambda: task.loss(start + t @ span.directions, rng),
        recipe.span_lr,
        recipe.span_steps,
        recipe.warmup,
    ):
        copies = start + t.detach() @ span.directions
        yield copies
    b = copies.clone().requires_grad_()
    for _ in _descent(b, lambda: task.loss(b, rng), recipe.lr, recipe.steps, recipe.warmup):
        yield b.detach().clone()


def _descent(
    parameter: Tensor, loss: Callable[[], Tensor], lr: float, n_steps: int, warmup: int
) -> Iterator[None]:
    """Adam with warm-up and a cosine down to a tenth; yields after each step."""
    optimiser = torch.optim.Adam([parameter], betas=(0.9, 0.98))
    for step in range(1, n_steps + 1):
        falling = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / n_steps)
        optimiser.param_groups[0]["lr"] = lr * falling * min(1.0, step / warmup)
        optimiser.zero_grad()
        torch.autograd.backward(loss())
        optimiser.step()
        yield


def _folds(n: int) -> list[frozenset[int]]:
    """The pairs held out from each copy: each once where there are few, else every fourth."""
    if n < _HALVES_BELOW:
        return [frozenset(range(0, n, 2)), frozenset(range(1, n, 2))]
    return [frozenset(range(0, n, 4))]


def _fitting(rows: Sequence[Row], n_tokens: int, rng: random.Random) -> Sequence[Row]:
    """All rows, or as many drawn ones as fit, at least one."""
    if sum(len(row.tokens) for row in rows) <= n_tokens:
        return rows
    drawn: list[Row] = []
    left = n_tokens
    for row in rng.sample(rows, len(rows)):
        if drawn and len(row.tokens) > left:
            break
        drawn.append(row)
        left -= len(row.tokens)
    return drawn
