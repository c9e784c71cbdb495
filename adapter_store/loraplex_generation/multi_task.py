"""The multi-task baseline: one adapter trained on all tasks, told the task in its prompt."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from loraplex_generation.zoo.tasks import Task

from .frozen_base import FrozenBase, LoraFA
from .layout import AdapterLayout
from .row_adam import RowAdam
from .scoring import mean_nll_per_group
from .taskdata import TaskData
from .tensor_file import read_tensor_file, write_tensor_file

__all__ = ["train_multi_task"]

_TASKS_PER_STEP, _TOKENS_PER_TASK = 4, 160


def train_multi_task(
    base: FrozenBase,
    layout: AdapterLayout,
    data: TaskData,
    tasks: Sequence[Task],
    checkpoint: Path,
    *,
    n_steps: int,
    lr: float = 4e-3,
    seed: int = 0,
    report: Callable[[str], None] = lambda _: None,
    every_s: float = 90.0,
) -> None:
    """Leaves `vector` [layout.size] and `step` in `checkpoint`, and goes on from it if it exists.

    Half of the groups carry a description in the prompt, half do not.
    """
    adam = RowAdam(torch.zeros(1, layout.size))
    step = _restore(adam, checkpoint)
    saved = time.monotonic()
    while step < n_steps:
        rng = random.Random(f"multi-task:{seed}:{step}")
        late = max(0.0, step / n_steps - 0.6) / 0.4
        rate = lr * min(1.0, (step + 1) / 10) * (1 - 0.9 * late)
        chosen = rng.sample(list(tasks), min(_TASKS_PER_STEP, len(tasks)))
        told = [rng.choice(t.descriptions()) if i % 2 == 0 else "" for i, t in enumerate(chosen)]
        batch = data.train_batch(chosen, _TOKENS_PER_TASK, rng, instructions=told)
        b = adam.rows.clone().requires_grad_()
        adapters = LoraFA(layout, b.expand(len(chosen), -1), base.dtype)
        loss = mean_nll_per_group(base.score(batch, adapters).nll, batch).mean()
        torch.autograd.backward(loss)
        assert b.grad is not None
        adam.step(b.grad, torch.zeros(1, dtype=torch.int64), lr=rate)
        step += 1
        if time.monotonic() - saved > every_s or step == n_steps:
            tensors = {"vector": adam.rows[0], **{f"adam.{k}": t for k, t in adam.state().items()}}
            write_tensor_file(checkpoint, tensors, {"step": step})
            saved = time.monotonic()
        if step % 20 == 0:
            report(f"multi-task step {step}/{n_steps} loss {float(loss.detach()):.3f}")


def _restore(adam: RowAdam, checkpoint: Path) -> int:
    """The step that was reached."""
    if not checkpoint.exists():
        return 0
    tensors, header, _ = read_tensor_file(checkpoint)
    adam.rows[0] = tensors["vector"]
    adam.restore({k: tensors[f"adam.{k}"] for k in adam.state()})
    return int(header["step"])
