"""The rows of the zoo's tasks, tokenised once."""

from __future__ import annotations

import random
from collections.abc import Sequence

from loraplex_generation.zoo.tasks import Example, Task

from .packing import ChatCodec, PackedBatch, Row, pack

__all__ = ["TaskData"]

_N_TRAIN = 600


class TaskData:
    """Training batches and evaluation batches of tasks, packed for the frozen base."""

    def __init__(self, codec: ChatCodec) -> None:
        self._codec = codec
        self._train: dict[str, list[Example]] = {}

    def train_batch(
        self,
        tasks: Sequence[Task],
        n_tokens: int,
        rng: random.Random,
        *,
        instructions: Sequence[str] = (),
    ) -> PackedBatch:
        """Random training rows, about `n_tokens` of each task: no group waits for a longer one.

        `instructions`, one per task, go before every prompt of the task; "" for none.
        """
        told = instructions or [""] * len(tasks)
        groups = [
            self._fill(task, n_tokens, rng, instruction)
            for task, instruction in zip(tasks, told, strict=True)
        ]
        return pack(self._codec.head, groups)

    def eval_batch(self, tasks: Sequence[Task], n_rows: int, *, split: str) -> PackedBatch:
        """The first `n_rows` rows of `split` for each task."""
        return pack(self._codec.head, self.eval_rows(tasks, n_rows, split=split))

    def eval_rows(
        self,
        tasks: Sequence[Task],
        n_rows: int,
        *,
        split: str,
        instructions: Sequence[str] = (),
    ) -> list[list[Row]]:
        """The first `n_rows` rows of `split` for each task, a list per task."""
        told = instructions or [""] * len(tasks)
        return [
            [self._codec.row(e, instruction=text) for e in task.examples(split, n_rows)]
            for task, text in zip(tasks, told, strict=True)
        ]

    def rows_of(self, examples: Sequence[Example]) -> list[Row]:
        return [self._codec.row(example) for example in examples]

    @property
    def codec(self) -> ChatCodec:
        return self._codec

    @property
    def head(self) -> tuple[int, ...]:
        """The tokens that every chat begins with."""
        return self._codec.head

    def _fill(self, task: Task, n_tokens: int, rng: random.Random, instruction: str) -> list[Row]:
        pool = self._train.get(task.name)
        if pool is None:
            pool = self._train[task.name] = task.examples("train", _N_TRAIN)
        chosen: list[Row] = []
        left = n_tokens
        while left > 0:
            row = self._codec.row(rng.choice(pool), instruction=instruction)
            if chosen and len(row.tokens) > left + 3:
                break
            chosen.append(row)
            left -= len(row.tokens)
        return chosen
