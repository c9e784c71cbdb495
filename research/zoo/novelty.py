"""What is new about a task for a library that was trained on others."""

from collections.abc import Sequence

from .operations import OPERATIONS
from .tasks import Task

NOVELTIES = ("trained", "combination", "interpolation", "language", "operation", "family")


def novelty(task: Task, trained: Sequence[Task]) -> str:
    """One of NOVELTIES, from the nearest to the farthest.

    "combination": operation and format were trained, apart. "interpolation": a number between two
    trained ones of its series. "language": the operation was trained in others. "operation": a new
    one of a trained family. "family": nothing of its family was trained.
    """
    if task in trained:
        return "trained"
    if any(other.content == task.content for other in trained):
        return "combination"
    if _is_between(task, trained):
        return "interpolation"
    if any(other.operation == task.operation for other in trained):
        return "language"
    return "operation" if any(other.family == task.family for other in trained) else "family"


def _is_between(task: Task, trained: Sequence[Task]) -> bool:
    asked = OPERATIONS[task.operation]
    known = [OPERATIONS[other.operation] for other in trained]
    places = [other.place for other in known if other.series == asked.series]
    return bool(asked.series) and bool(places) and min(places) < asked.place < max(places)
