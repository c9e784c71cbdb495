"""Operations written as rows of a table: an answer, and the phrases that ask for it.

A phrase is an order ("reverse the word") or a thing ("the last letter of the word"); frames make
sentences of it. Phrases and frames of the test wordings occur in no training wording.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from .draws import Drawn, Operation
from .formats import FORMATS

T = TypeVar("T")
Input = Callable[[random.Random, str], tuple[str, T]]  # (generator, split) → (text, its value)

_ORDERS = frozenset(  # with one of these a phrase begins that is an order
    """
    abbreviate add allow append apply approximate arrange ask call capitalise censor choose cite
    class command compare compose convert copy count cut decrease dedicate divide double draw drop
    encode end exchange extract fill find glue go group hide increase join keep label leave make
    mask mirror move multiply name negate number offer order pad pick place play prefix prepend
    punctuate put quote raise read reformat remove rename repeat replace reverse rotate round say
    separate set shift shorten shout skip sort spell split start subtract swap take translate turn
    wrap write
    """.split()  # noqa: SIM905  a list of ninety literals reads worse
)
_THING_FRAMES = ("Give {}", "Write {}", "Return {}", "Answer with {}")
_THING_TEST_FRAMES = ("I need {}", "Tell me {}", "Output {}")
_ORDER_FRAMES = ("{}", "Please {}", "Your task: {}", "Take the input and {}")
_ORDER_TEST_FRAMES = ("I want you to {}", "You should {}", "Now {}")
_ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Row(NamedTuple):
    answer: Callable[..., str]  # of the value of an input; in `series` also of the number
    phrases: tuple[str, ...]  # for training
    test_phrases: tuple[str, ...]


def table(
    family: str,
    inputs: Input[T],
    rows: Mapping[str, Row],
    *,
    formats: Sequence[str] = tuple(FORMATS),
) -> dict[str, Operation]:
    """One operation for each row, all on the same kind of input."""
    return {
        name: Operation(
            family,
            _draw(inputs, row.answer),
            *_wordings(row.phrases, row.test_phrases),
            formats=tuple(formats),
        )
        for name, row in rows.items()
    }


def series(
    family: str,
    inputs: Input[T],
    name: str,
    places: Sequence[int],
    row: Row,
    *,
    formats: Sequence[str] = tuple(FORMATS),
) -> dict[str, Operation]:
    """`name`-N for each N of `places`; `{n}`, `{word}`, `{nth}` and `{s}` (plural) in phrases."""
    return {
        f"{name}-{n}": Operation(
            family,
            _draw(inputs, row.answer, n),
            *_wordings(fill_number(row.phrases, n), fill_number(row.test_phrases, n)),
            series=name,
            place=n,
            formats=tuple(formats),
        )
        for n in places
    }


def nth(n: int) -> str:
    """`nth(2)` is "second"."""
    return _ORDINALS[n] if n < len(_ORDINALS) else f"{n}th"


def _draw(
    inputs: Input[T], answer: Callable[..., str], *number: int
) -> Callable[[random.Random, str, str], Drawn]:
    def draw(rng: random.Random, split: str, language: str) -> Drawn:
        text, value = inputs(rng, split)
        return text, answer(value, *number)

    return draw


def fill_number(phrases: Sequence[str], n: int) -> tuple[str, ...]:
    """`{n}`, `{word}`, `{nth}` and `{s}` (plural) of phrases."""
    word = _WORDS[n] if n < len(_WORDS) else str(n)
    return tuple(p.format(n=n, word=word, nth=nth(n), s="" if n == 1 else "s") for p in phrases)


def _wordings(
    phrases: Sequence[str], test_phrases: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Escaped for `str.format`, which fills in the language."""
    train = [w for p in phrases for w in _framed(p, _THING_FRAMES, _ORDER_FRAMES)]
    test = [w for p in test_phrases for w in _framed(p, _THING_TEST_FRAMES, _ORDER_TEST_FRAMES)]
    return tuple(_escaped(w) for w in train), tuple(_escaped(w) for w in test)


def _framed(phrase: str, things: Sequence[str], orders: Sequence[str]) -> list[str]:
    frames = orders if phrase.split()[0] in _ORDERS else things
    return [(made := frame.format(phrase))[0].upper() + made[1:] for frame in frames]


def _escaped(wording: str) -> str:
    return wording.replace("{", "{{").replace("}", "}}").replace("{{language}}", "{language}")
