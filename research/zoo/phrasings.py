"""How people may put what the wide zoo trains: what a map learns to read from.

A trained operation has its own wordings, most of them two phrases in frames (`rows.py`), and nearly
forty paraphrases; a format has its suffixes and two dozen more. The paraphrases were written from
the wordings, three examples and the neighbours of the operation, without sight of any test wording;
those that held a test phrase by chance were left out, and a test looks for them.
"""

import json
import random
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from .formats import FORMATS
from .languages import LANGUAGES
from .operations import OPERATIONS
from .rows import fill_number
from .tasks import casual

_WITHOUT_FORMAT = 0.25  # share of the phrasings that leave the format unsaid: plain


class Phrasing(NamedTuple):
    content: int  # index in the contents asked for
    dressing: str  # the format that it asks for
    phrases: tuple[str, str]  # the operation's and the format's that it was made from
    text: str


def paraphrases(operation: str) -> tuple[str, ...]:
    """Of an operation, with `{language}` where one is to be filled in. Those that are held out have
    none, but for numbers of a series that is trained with others.
    """
    known = OPERATIONS[operation]
    found = _written()["operations"].get(known.series or operation, ())
    return fill_number(found, known.place) if known.series else tuple(found)


def suffixes(dressing: str) -> tuple[str, ...]:
    """How people ask for a format, behind an operation's phrase."""
    return (*FORMATS[dressing].suffixes, *_written()["formats"][dressing])


def phrasings(
    contents: Sequence[str], formats: Sequence[str], n: int, *, seed: int = 0
) -> list[Phrasing]:
    """`n` of each phrase of each content: with one of the formats, as typed by different people."""
    rng = random.Random(seed)
    made: list[Phrasing] = []
    for i, content in enumerate(contents):
        operation, _, language = content.partition(".")
        of = OPERATIONS[operation]
        known = [name for name in of.formats if name in formats]
        for phrase in (*of.wordings, *paraphrases(operation)):
            said = phrase.format(language=LANGUAGES.get(language, ""))
            said = said[0].upper() + said[1:]
            for _ in range(n):
                dressing = rng.choice(known)
                suffix = rng.choice(suffixes(dressing))
                if "plain" in formats and rng.random() < _WITHOUT_FORMAT:
                    dressing, suffix = "plain", ""
                careful = rng.random() < 0.5
                text = said + suffix if careful else casual(said, suffix, rng)
                made.append(Phrasing(i, dressing, (phrase, suffix), text))
    return made


@cache
def _written() -> dict[str, dict[str, list[str]]]:
    read: dict[str, dict[str, list[str]]] = json.loads(
        files(__package__).joinpath("paraphrases.json").read_text(encoding="utf-8")
    )
    return read
