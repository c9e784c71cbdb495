"""Scores of an answer, between 0 and 1, and the mean of scores with its interval."""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_N_RESAMPLES = 2000
_TAIL = 0.025  # on each side of the interval

Metric = Callable[[str, str], float]
"""Maps an answer and the expected answer to a score between 0 and 1."""


class Mean(NamedTuple):
    value: float
    low: float  # of the interval that holds the mean of new rows with 95 % confidence
    high: float


def exact(answer: str, expected: str) -> float:
    """Return 1 if the texts are equal but for case and spaces."""
    return float(_plain(answer) == _plain(expected))


def contains(answer: str, expected: str) -> float:
    """Return 1 if the expected text is part of the answer, but for case and spaces."""
    return float(_plain(expected) in _plain(answer))


def json_equal(answer: str, expected: str) -> float:
    """Return 1 if both texts are JSON of the same value, else 0.

    The order of keys and the case of strings do not matter.
    """
    try:
        return float(_folded(json.loads(answer)) == _folded(json.loads(expected)))
    except (ValueError, RecursionError):
        return 0.0


def rouge_l(answer: str, expected: str) -> float:
    """Return the F1 of ROUGE-L (Lin 2004) over lower-case words and single punctuation marks."""
    ours, theirs = (re.findall(r"\w+|[^\w\s]", text.lower()) for text in (answer, expected))
    if not ours or not theirs:
        return float(ours == theirs)
    common = [0] * (len(theirs) + 1)  # length of the longest common subsequence, by prefix
    for word in ours:
        diagonal = 0
        for index, other in enumerate(theirs, 1):
            above = common[index]
            common[index] = diagonal + 1 if word == other else max(above, common[index - 1])
            diagonal = above
    return 2 * common[-1] / (len(ours) + len(theirs))


METRICS: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "json": json_equal,
    "rouge-l": rouge_l,
}


def fitting_metric(expected: Sequence[str]) -> str:
    """Return ``json`` if each expected answer is a JSON object or list, else ``exact``."""
    return "json" if all(map(_is_json, expected)) else "exact"


def mean_of(scores: Sequence[float]) -> Mean:
    """Return the mean with a bootstrap interval (Efron 1979); the same scores give the same."""
    rng = random.Random(0)
    n = len(scores)
    means = sorted(sum(rng.choices(scores, k=n)) / n for _ in range(_N_RESAMPLES))
    cut = int(_TAIL * _N_RESAMPLES)
    return Mean(sum(scores) / n, means[cut], means[-1 - cut])


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()


def _folded(value: object) -> object:
    match value:
        case str():
            return _plain(value)
        case list():
            return [_folded(item) for item in value]
        case dict():
            return {str(key).lower(): _folded(item) for key, item in value.items()}
        case _:
            return value
