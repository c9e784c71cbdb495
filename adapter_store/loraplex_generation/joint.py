"""Stage one of the library: all training tasks at once, through the frozen base.

Every adapter is a sum of factor vectors, B(task) = c(description) · V, with c from the text
(`factors.py`). One step packs a few tasks, each with a random wording of its description, and
moves only the vectors that took part. What is learnt is therefore additive by construction,
which is what carries over to combinations that were never trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex_generation.zoo.tasks import Task

from .factors import Factors
from .frozen_base import FrozenBase, LoraFA
from .layout import AdapterLayout
from .row_adam import RowAdam
from .scoring import mean_nll_per_group
from .task_training import RunningLosses, TaskTraining
from .taskdata import TaskData
from .tensor_file import read_tensor_file, write_tensor_file

__all__ = ["JointRecipe", "JointTraining"]


@dataclass(frozen=True, slots=True)
class JointRecipe:
    n_steps: int = 240
    tasks_per_step: int = 6
    tokens_per_task: int = 108  # of rows, the shared head not counted
    lr: float = 3e-3
    warmup: int = 20
    decay_from: float = 0.6  # fraction of the steps after which the rate falls to a tenth
    pair_dropout: float = 0.3  # so that operation and language alone must also do
    seed: int = 0

    def rate(self, step: int) -> float:
        late = max(0.0, step / self.n_steps - self.decay_from) / (1 - self.decay_from)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (1 - 0.9 * min(1.0, late))


class JointTraining(TaskTraining):
    """The vectors V and everything needed to go on from them. Not thread-safe."""

    name, report_every = "joint", 10

    def __init__(
        self,
        base: FrozenBase,
        layout: AdapterLayout,
        data: TaskData,
        tasks: list[Task],
        points: Mapping[str, Tensor],
        recipe: JointRecipe,
    ) -> None:
        """`points`: task name → [n_descriptions, factors.size], c of each training wording."""
        losses = RunningLosses(tasks, start=3.0, base_weight=0.15, max_loss=2.0)
        super().__init__(recipe.n_steps, losses)
        self._base, self._layout, self._data = base, layout, data
        self._points, self.recipe = points, recipe
        factors = Factors.of(tasks)
        self.vectors = torch.zeros(factors.size, layout.size)
        self._first_pair = factors.size - len(factors.pairs)
        self._adam = RowAdam(self.vectors)

    def start_from(self, vectors: Tensor, step: int) -> None:
        """Goes on from vectors whose optimiser state is lost."""
        self.vectors.copy_(vectors)
        self.step = step

    def save(self, path: Path) -> None:
        adam = {f"adam.{name}": tensor for name, tensor in self._adam.state().items()}
        header = {"step": self.step, "loss": self._losses.by_task}
        write_tensor_file(path, {"vectors": self.vectors, **adam}, header)

    def _restore(self, path: Path) -> None:
        state = read_tensor_file(path)
        tensors = state.tensors
        prefix = "adam."
        self.vectors.copy_(tensors["vectors"])
        self._adam.restore(
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        )
        self._losses.restore(state.header["loss"])
        self.step = int(state.header["step"])

    def _one_step(self) -> float:
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}:{self.step}")
        tasks = self._losses.draw(recipe.tasks_per_step, rng)
        c = torch.stack([self._point(task, rng) for task in tasks])  # [n_tasks, factors]
        vectors = c @ self.vectors
        vectors.requires_grad_()
        batch = self._data.train_batch(tasks, recipe.tokens_per_task, rng)
        adapters = LoraFA(self._layout, vectors, self._base.dtype)
        losses = mean_nll_per_group(self._base.score(batch, adapters).nll, batch)
        torch.autograd.backward(losses.sum())
        assert vectors.grad is not None
        touched = (c.abs() > 0.05).any(0).nonzero()[:, 0]
        self._adam.step(c.T @ vectors.grad, touched, lr=recipe.rate(self.step))
        self._losses.note(tasks, losses)
        return float(losses.detach().mean())

    def _point(self, task: Task, rng: random.Random) -> Tensor:
        points = self._points[task.name]
        point = points[rng.randrange(len(points))].clone()
        if rng.random() < self.recipe.pair_dropout:
            point[self._first_pair :] = 0
        return point
