"""Word pools. `pool_part` splits each pool, so that no content word is in two splits."""

import hashlib
import json
from functools import cache
from importlib.resources import files

SPLITS = ("train", "validation", "test")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_TRAIN_BELOW, _VALIDATION_BELOW = 150, 200  # of 256


@cache
def pool(name: str) -> tuple[str, ...]:
    """The words of `nouns`, `foods` or `cities`."""
    lines = json.loads(files(__package__).joinpath("words.json").read_text())[name]
    return tuple(" ".join(lines).split())


def part_of(word: str) -> str:
    """The split that owns `word`, for ever."""
    part = hashlib.sha256(word.encode()).digest()[0]
    if part < _TRAIN_BELOW:
        return "train"
    return "validation" if part < _VALIDATION_BELOW else "test"


@cache
def pool_part(words: tuple[str, ...], split: str) -> tuple[str, ...]:
    """The words that belong to `split`, in their order, without repetitions."""
    return tuple(dict.fromkeys(word for word in words if part_of(word) == split))
