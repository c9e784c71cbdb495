"""What goes with any operation: the language and the format that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_generation.zoo.tasks import Task

__all__ = ["Dressings", "contents_of"]

_NONE = ""  # the language of operations that have none


@dataclass(frozen=True, slots=True)
class Dressings:
    """Languages and formats: the levels that have a row of their own, by their tasks' names."""

    languages: tuple[str, ...]
    formats: tuple[str, ...]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Dressings:
        languages = dict.fromkeys(task.language for task in tasks if task.language)
        return cls(tuple(languages), tuple(dict.fromkeys(task.format for task in tasks)))

    @property
    def names(self) -> list[str]:
        """What each of the first rows stands for."""
        return ["mean", *self.languages, *self.formats]

    @property
    def groups(self) -> tuple[int, int]:
        """Levels that readers have to tell apart; "no language" comes first."""
        return 1 + len(self.languages), len(self.formats)

    def labels(self, language: str, dressing: str) -> tuple[int, int]:
        return (_NONE, *self.languages).index(language), self.formats.index(dressing)

    def point(self, language: Tensor, dressing: Tensor) -> Tensor:
        """[n, len(names)] from the two distributions [n, levels]."""
        return torch.cat([torch.ones_like(language[:, :1]), language[:, 1:], dressing], 1)

    def in_language(self, point: Tensor, language: str) -> Tensor:
        """A point [len(names)] in `language` alone, which may be none, its formats as they were."""
        moved = point.clone()
        moved[1 : self.groups[0]] = 0
        if language != _NONE:
            moved[1 + self.languages.index(language)] = 1
        return moved

    def exact_points(self, tasks: Sequence[Task]) -> Tensor:
        """[n_tasks, len(names)] of tasks whose levels are all known."""
        labels = torch.tensor([self.labels(task.language, task.format) for task in tasks])
        hot = [F.one_hot(labels[:, i], n).float() for i, n in enumerate(self.groups)]
        return self.point(*hot)


def contents_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Each once, in the order in which the tasks have them."""
    return tuple(dict.fromkeys(task.content for task in tasks))
