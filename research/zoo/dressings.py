"""Languages and formats: the parts of a task that combine with any operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_NONE = ""  # the language of operations that have none


@dataclass(frozen=True, slots=True)
class TaskName:
    """An operation, in a language if it has one, and the format of its answers."""

    operation: str
    language: str  # "" if the operation has none
    format: str

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the task that is called `name`. Raises ValueError if the name has no format."""
        content, separator, answer_format = name.partition("/")
        if not separator:
            raise ValueError(f"task {name!r} names no format; write it as operation/format")
        operation, _, language = content.partition(".")
        return cls(operation, language, answer_format)

    @property
    def content(self) -> str:
        """The operation and its language: the task without its format."""
        return f"{self.operation}.{self.language}" if self.language else self.operation

    @property
    def name(self) -> str:
        return f"{self.content}/{self.format}"


def contents_of(tasks: Sequence[TaskName]) -> tuple[str, ...]:
    """Return each content once, in the order of the tasks."""
    return tuple(dict.fromkeys(task.content for task in tasks))


@dataclass(frozen=True, slots=True)
class Dressings:
    """The languages and formats that a text map has a row for."""

    languages: tuple[str, ...]
    formats: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Sequence[TaskName]) -> Dressings:
        languages = dict.fromkeys(task.language for task in tasks if task.language)
        return cls(tuple(languages), tuple(dict.fromkeys(task.format for task in tasks)))

    @property
    def names(self) -> list[str]:
        """The names of a map's first rows: the constant, the languages, the formats."""
        return ["mean", *self.languages, *self.formats]

    @property
    def groups(self) -> tuple[int, int]:
        """The number of language labels, the first of which is "none", and of format labels."""
        return 1 + len(self.languages), len(self.formats)

    def labels(self, language: str, answer_format: str) -> tuple[int, int]:
        return (_NONE, *self.languages).index(language), self.formats.index(answer_format)

    def point(self, language: Tensor, answer_format: Tensor) -> Tensor:
        """Return [n, len(names)] from the two distributions [n, n_labels]."""
        return torch.cat([torch.ones_like(language[:, :1]), language[:, 1:], answer_format], 1)

    def exact_points(self, tasks: Sequence[TaskName]) -> Tensor:
        """Return [n_tasks, len(names)] for tasks whose language and format are known."""
        labels = torch.tensor([self.labels(task.language, task.format) for task in tasks])
        hot = [F.one_hot(labels[:, i], n).float() for i, n in enumerate(self.groups)]
        return self.point(*hot)
