"""The rows of the zoo's tasks, tokenised once."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .packing import ChatCodec, PackedBatch, Row, pack
from .zoo.tasks import Task

__all__ = ["TaskData"]

_N_TRAIN = 600


class TaskData:
    """Training batches and evaluation batches of tasks, packed for the frozen base."""

    def __init__(self, codec: ChatCodec) -> None:
        self._codec = codec
        self._train: dict[str, list[Row]] = {}

    def train_batch(self, tasks: Sequence[Task], n_tokens: int, rng: random.Random) -> PackedBatch:
        """Random training rows, about `n_tokens` of each task: no group waits for a longer one."""
        return pack(self._codec.head, [self._fill(task, n_tokens, rng) for task in tasks])

    def eval_batch(
        self, tasks: Sequence[Task], n_rows: int, *, split: str, instruction: str = ""
    ) -> PackedBatch:
        """The first `n_rows` rows of `split` for each task."""
        groups = [
            [self._codec.row(e, instruction=instruction) for e in task.examples(split, n_rows)]
            for task in tasks
        ]
        return pack(self._codec.head, groups)

    def _fill(self, task: Task, n_tokens: int, rng: random.Random) -> list[Row]:
        rows = self._train.get(task.name)
        if rows is None:
            examples = task.examples("train", _N_TRAIN)
            rows = self._train[task.name] = [self._codec.row(e) for e in examples]
        chosen: list[Row] = []
        left = n_tokens
        while left > 0:
            row = rng.choice(rows)
            if chosen and len(row.tokens) > left + 3:
                break
            chosen.append(row)
            left -= len(row.tokens)
        return chosen
