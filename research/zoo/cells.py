"""Which formats go with a content, and which of these tasks nothing has held out."""

from functools import cache

from .operations import OPERATIONS
from .split import ZooSplit, load_split
from .tasks import Task


def cells(content: str) -> list[str]:
    """Its tasks, but for those in capitals whose answers have none."""
    names = [f"{content}/{dressing}" for dressing in OPERATIONS[content.split(".")[0]].formats]
    return [name for name in names if not name.endswith("/caps") or _has_letters(content)]


def trainable(split: ZooSplit) -> list[Task]:
    """The contents of its training tasks in all formats that these have, but for held-out tasks:
    its own and the shipped library's.
    """
    train = [Task.parse(name) for name in split.sets["train"]]
    names = dict.fromkeys(task.name for task in train)
    names |= dict.fromkeys(name for task in train for name in cells(task.content))
    held_out = {
        name
        for sets in (split.sets, load_split().sets)
        for of, members in sets.items()
        if of != "train"
        for name in members
    }
    formats = {task.format for task in train}
    found = [Task.parse(name) for name in names if name not in held_out]
    return [task for task in found if task.format in formats]


@cache
def _has_letters(content: str) -> bool:
    plain = Task.parse(f"{content}/plain").examples("train", 12)
    return sum(e.answer.upper() != e.answer for e in plain) > len(plain) / 2
