"""Task vectors: the base's last-token hidden states after a description or prompts.

    prompts given   mean over "description ⏎ prompt" of the state that is about to answer
    none            the state behind the description alone

The description leads every prompt: without it, tasks that share their inputs (the same numbers in
five languages) would share their vector. Nothing is labelled and no adapter is on.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_generation.zoo.tasks import Task

from .chat_base import ChatBase
from .errors import UnfitPrompts
from .packing import Row, pack

__all__ = ["MIN_PROMPTS", "TaskConditions", "TaskVectors", "train_conditions"]

MIN_PROMPTS = 8  # fewer say more about themselves than about the task
_ROWS = 16  # of one forward
_REMEMBERED = 64  # vectors: the draws of one order ask for the same one
_WITH_PROMPTS = 8  # wordings of a task that also lead prompts in training
_POOL = 64  # training inputs that these prompts are drawn from


class TaskVectors:
    """Thread-safe and deterministic. The base is loaded at the first question, and stays."""

    def __init__(self, load: Callable[[], ChatBase]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._remembered = lru_cache(_REMEMBERED)(self._compute)

    @classmethod
    def of_directory(cls, directory: Path) -> TaskVectors:
        """From a model directory that ``FrozenBase`` reads."""

        return cls(lambda: ChatBase.of_directory(directory, mapped=True))

    def of(self, description: str, prompts: Sequence[str] = ()) -> Tensor:
        """float32 [hidden_size]. Raises UnfitPrompts for one to seven prompts."""
        if 0 < len(prompts) < MIN_PROMPTS:
            raise UnfitPrompts(
                f"a task is read off at least {MIN_PROMPTS} prompts, not {len(prompts)}; "
                "give more, or none and the description alone is read"
            )
        with self._lock:
            return self._remembered(description, tuple(prompts))

    def _compute(self, description: str, prompts: tuple[str, ...]) -> Tensor:
        _, codec = self._parts
        texts = [f"{description}\n{prompt}" for prompt in prompts] or [description]
        return self._states([codec.prompt(text) for text in texts]).mean(0)

    @torch.inference_mode()
    def _states(self, rows: Sequence[Row]) -> Tensor:
        """float32 [n_rows, hidden_size]: of each row's last token, behind the final norm."""
        base, codec = self._parts
        found = []
        for at in range(0, len(rows), _ROWS):
            part = rows[at : at + _ROWS]
            hidden = base.hidden(pack(codec.head, [part]))[0]
            lengths = torch.tensor([len(row.tokens) for row in part])
            found.append(hidden[len(codec.head) + lengths.cumsum(0) - 1].float())
        return torch.cat(found)

    @cached_property
    def _parts(self) -> ChatBase:
        return self._load()


class TaskConditions(NamedTuple):
    vectors: Tensor  # float32 [n, hidden_size]
    owner: Tensor  # int64 [n]: the index of the task


def train_conditions(
    reader: TaskVectors, tasks: Sequence[Task], report: Callable[[str], None] = lambda _: None
) -> TaskConditions:
    """Of every training wording alone, and of some before prompts; minutes for a whole zoo."""
    vectors: list[Tensor] = []
    owner: list[int] = []
    for i, task in enumerate(tasks):
        wordings = task.descriptions()
        inputs = [example.prompt for example in task.examples("train", _POOL)]
        rng = random.Random(f"{task.name}:task-vectors")
        vectors += [reader.of(wording) for wording in wordings]
        led = wordings[:: max(1, len(wordings) // _WITH_PROMPTS)]
        vectors += [reader.of(wording, rng.sample(inputs, MIN_PROMPTS)) for wording in led]
        owner += [i] * (len(wordings) + len(led))
        if (i + 1) % 8 == 0:
            report(f"task vectors of {i + 1}/{len(tasks)} tasks")
    return TaskConditions(torch.stack(vectors), torch.tensor(owner))
