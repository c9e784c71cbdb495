"""What trainings over many tasks share: hard tasks come more often, and a killed run goes on."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from loraplex_generation.zoo.tasks import Task

__all__ = ["RunningLosses", "TaskTraining"]


class RunningLosses:
    """The training loss of each task, a running mean in nats a token."""

    def __init__(
        self, tasks: Sequence[Task], *, start: float, base_weight: float, max_loss: float
    ) -> None:
        """`start`: of a task that had no step yet. A task is drawn in proportion to `base_weight`
        and its loss, which counts up to `max_loss`.
        """
        self._tasks = list(tasks)
        self._base_weight, self._max_loss = base_weight, max_loss
        self.by_task = dict.fromkeys((task.name for task in tasks), start)

    @property
    def mean(self) -> float:
        return sum(self.by_task.values()) / len(self.by_task)

    def draw(self, n: int, rng: random.Random) -> list[Task]:
        """So many different tasks, or all; those that are still hard come more often."""
        losses = self.by_task
        weights = [self._base_weight + min(losses[t.name], self._max_loss) for t in self._tasks]
        chosen: dict[str, Task] = {}
        while len(chosen) < min(n, len(self._tasks)):
            task = rng.choices(self._tasks, weights)[0]
            chosen[task.name] = task
        return list(chosen.values())

    def note(self, tasks: Sequence[Task], losses: Tensor) -> None:
        """`losses` [n_tasks]: of a step."""
        for task, loss in zip(tasks, losses.tolist(), strict=True):
            self.by_task[task.name] += 0.3 * (loss - self.by_task[task.name])

    def restore(self, by_task: Mapping[str, float]) -> None:
        self.by_task.update(by_task)


class TaskTraining(ABC):
    """Steps over many tasks, each of them a function of its number. Not thread-safe."""

    name: ClassVar[str]  # in what is reported
    report_every: ClassVar[int]  # steps

    def __init__(self, n_steps: int, losses: RunningLosses) -> None:
        self._n_steps, self._losses = n_steps, losses
        self.step = 0  # steps that were done

    def run(self, checkpoint: Path, *, report: Callable[[str], None], every_s: float = 90) -> None:
        """Trains to the end, saving `checkpoint` now and then; goes on from it if it exists."""
        if checkpoint.exists():
            self._restore(checkpoint)
            report(f"going on from step {self.step}")
        saved = time.monotonic()
        while self.step < self._n_steps:
            loss = self._one_step()
            self.step += 1
            if time.monotonic() - saved > every_s or self.step == self._n_steps:
                self.save(checkpoint)
                saved = time.monotonic()
            if self.step % self.report_every == 0:
                of = f"{self.step}/{self._n_steps}"
                report(f"{self.name} step {of} loss {loss:.3f} mean {self._losses.mean:.3f}")

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes all that the next step depends on."""

    @abstractmethod
    def _restore(self, path: Path) -> None:
        """Reads what `save` has written."""

    @abstractmethod
    def _one_step(self) -> float:
        """Trains on the tasks of step number `step`; returns the mean of their losses."""
