"""Stage two of the library: each task on its own, from where the joint stage left it.

Also how an oracle is made: an adapter trained on a held-out task itself, the upper bound that
generated adapters are measured against.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from loraplex_generation.zoo.tasks import Task

from .frozen_base import FrozenBase, LoraFA
from .layout import AdapterLayout
from .scoring import TaskScore, mean_nll_per_group, score_groups
from .taskdata import TaskData

__all__ = ["Expert", "ExpertCard", "ExpertRecipe", "train_experts"]


@dataclass(frozen=True, slots=True)
class ExpertRecipe:
    """Constant small rate at the end, so that the last steps are samples around one optimum."""

    max_steps: int = 24
    chunk: int = 12  # steps between looks at the validation rows
    tokens_per_task: int = 160  # of rows, the shared head not counted
    lr: float = 1e-3
    warmup: int = 4
    snapshots: int = 8  # the last steps that are kept
    validation_rows: int = 12
    least_gain: float = 0.01  # relative NLL gain of a chunk below which a task stops
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ExpertCard:
    """What the quality gate reads; scores are on validation rows."""

    task: str
    steps: int
    base_nll: float
    start_nll: float
    nll: float
    base_exact: float
    exact: float

    @property
    def passes(self) -> bool:
        """Twenty points of exact match or thirty per cent of the base's NLL, whichever first."""
        return self.exact >= self.base_exact + 0.2 or self.nll <= 0.7 * self.base_nll

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "passes": self.passes}


@dataclass(frozen=True, slots=True)
class Expert:
    card: ExpertCard
    mean: Tensor  # float32 [size], over the snapshots
    snapshots: Tensor  # float32 [n_snapshots, size]


def train_experts(
    base: FrozenBase,
    layout: AdapterLayout,
    data: TaskData,
    tasks: Sequence[Task],
    start: Tensor,
    recipe: ExpertRecipe,
) -> list[Expert]:
    """Trains `tasks` side by side in one forward. `start` [n_tasks, size]."""
    b = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([b], lr=recipe.lr, betas=(0.9, 0.98))
    rng = random.Random(f"experts:{recipe.seed}:{tasks[0].name}")
    look = _Look(base, layout, data, tasks, recipe)
    first = look(start)
    best = _Best(tasks, first, start)
    last: deque[Tensor] = deque(maxlen=recipe.snapshots)
    for step in range(1, recipe.max_steps + 1):
        optimiser.param_groups[0]["lr"] = recipe.lr * min(1.0, step / recipe.warmup)
        batch = data.train_batch(tasks, recipe.tokens_per_task, rng)
        scores = base.score(batch, LoraFA(layout, b, base.dtype))
        optimiser.zero_grad()
        torch.autograd.backward(mean_nll_per_group(scores.nll, batch).sum())
        optimiser.step()
        last.append(b.detach().clone())
        if step % recipe.chunk == 0 or step == recipe.max_steps:
            window = torch.stack(list(last), 1)  # [n_tasks, n_snapshots, size]
            gained = best.offer(look(window.mean(1)), window, step, recipe.least_gain)
            if not gained:
                break
    return best.experts(look.base_scores, first)


class _Look:
    """Scores of adapters on the validation rows, and of the base, once."""

    def __init__(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        tasks: Sequence[Task],
        recipe: ExpertRecipe,
    ) -> None:
        self._base, self._layout = base, layout
        self._batch = data.eval_batch(tasks, recipe.validation_rows, split="validation")
        self.base_scores = score_groups(base, self._batch)

    def __call__(self, vectors: Tensor) -> list[TaskScore]:
        with torch.inference_mode():
            adapters = LoraFA(self._layout, vectors, self._base.dtype)
            return score_groups(self._base, self._batch, adapters)


class _Best:
    """The best window of snapshots of each task so far."""

    def __init__(self, tasks: Sequence[Task], scores: list[TaskScore], start: Tensor) -> None:
        self._tasks = tasks
        self._scores = list(scores)
        self._windows = [vector[None] for vector in start]
        self._steps = [0] * len(tasks)

    def offer(self, scores: list[TaskScore], windows: Tensor, step: int, least_gain: float) -> bool:
        """Whether any task gained enough to go on."""
        gained = False
        for i, score in enumerate(scores):
            if score.nll < self._scores[i].nll:
                gained |= score.nll < (1 - least_gain) * self._scores[i].nll
                self._scores[i], self._windows[i], self._steps[i] = score, windows[i], step
        return gained

    def experts(self, base: list[TaskScore], first: list[TaskScore]) -> list[Expert]:
        return [
            Expert(
                ExpertCard(
                    task.name,
                    self._steps[i],
                    base[i].nll,
                    first[i].nll,
                    self._scores[i].nll,
                    base[i].exact,
                    self._scores[i].exact,
                ),
                self._windows[i].mean(0),
                self._windows[i],
            )
            for i, task in enumerate(self._tasks)
        ]
