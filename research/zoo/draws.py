"""What an operation is, and the inputs that operations are drawn on.

Content words, numbers, dates and names belong to one split for ever (`words.part_of`), so an input
of one split never occurs in another.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

from .words import part_of, pool, pool_part

Drawn = tuple[str, str]  # input, bare answer


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation. The task fills in `{language}` in a wording.

    `draw` takes a seeded generator, the split whose content words it may use, and the language
    code ("" for operations without one).
    """

    draw: Callable[[random.Random, str, str], Drawn]
    wordings: tuple[str, ...]  # for training
    test_wordings: tuple[str, ...]  # never seen in training


def draw_number(rng: random.Random, split: str, low: int, high: int) -> int:
    while part_of(f"#{(number := rng.randint(low, high))}") != split:
        pass
    return number


def draw_day(rng: random.Random, split: str) -> date:
    """Between 1950 and 2049."""
    while True:
        day = date(1950, 1, 1) + timedelta(days=rng.randrange(100 * 365))
        if part_of(day.isoformat()) == split:
            return day


def draw_name(rng: random.Random, split: str) -> tuple[str, str]:
    """(first, last). Needs the extra `research`."""
    return rng.choice(_names("first", split)), rng.choice(_names("last", split))


def draw_foods(rng: random.Random, split: str) -> list[str]:
    """Three to five."""
    return rng.sample(pool_part(pool("foods"), split), rng.randint(3, 5))


@cache
def _names(kind: str, split: str) -> tuple[str, ...]:
    from faker.providers.person.en_US import Provider

    names = sorted(Provider.first_names if kind == "first" else Provider.last_names)
    return pool_part(tuple(name for name in names if name.isalpha()), split)
