"""The honest rival of every generator: one adapter trained on all tasks, told the task in words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .frozen_base import BOnlyLora, FrozenBase
from .layout import AdapterLayout
from .scoring import mean_nll_per_group
from .taskdata import TaskData
from .zoo.tasks import Task

__all__ = ["train_multi_task"]

_TASKS_PER_STEP, _TOKENS_PER_TASK = 4, 160


def train_multi_task(
    base: FrozenBase,
    layout: AdapterLayout,
    data: TaskData,
    tasks: Sequence[Task],
    *,
    n_steps: int,
    lr: float = 4e-3,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """[layout.size]. Half of the groups carry a description in the prompt, half do not."""
    b = torch.zeros(1, layout.size, requires_grad=True)
    optimiser = torch.optim.Adam([b], lr=lr, betas=(0.9, 0.98))
    for step in range(n_steps):
        rng = random.Random(f"multi-task:{seed}:{step}")
        late = max(0.0, step / n_steps - 0.6) / 0.4
        optimiser.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - 0.9 * late)
        chosen = rng.sample(list(tasks), min(_TASKS_PER_STEP, len(tasks)))
        told = [rng.choice(t.descriptions()) if i % 2 == 0 else "" for i, t in enumerate(chosen)]
        batch = data.train_batch(chosen, _TOKENS_PER_TASK, rng, instructions=told)
        adapters = BOnlyLora(layout, b.expand(len(chosen), -1), base.dtype)
        losses = mean_nll_per_group(base.score(batch, adapters).nll, batch)
        optimiser.zero_grad()
        torch.autograd.backward(losses.mean())
        optimiser.step()
        if (step + 1) % 20 == 0:
            report(f"multi-task step {step + 1}/{n_steps} loss {float(losses.detach().mean()):.3f}")
    return b.detach()[0]
