"""Values that questions to tools name: cities, mails, numbers, times, codes, short phrases."""

import random
from collections.abc import Callable

from .task import Words
from .words import CITIES, FIRST_NAMES, LAST_NAMES

Value = str | int | float
Draw = Callable[[random.Random, bool], Value]  # (rng, held out)

_ADJECTIVES = Words.parse(
    "blue green quick late weekly final open lost happy broken new early quiet golden public "
    "annual second heavy empty missing winter summer local spare"
)
_NOUNS = Words.parse(
    "meeting lamps dinner report holiday keys garden budget concert bridge window party kettle "
    "bicycle rehearsal review letters forest island mirror tickets journey lecture picnic boots"
)
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_HOSTS = Words.parse("acme.com globex.org initech.net hooli.io vandelay.de stark.com wayne.org")
_FILES = Words.parse("notes report image backup draft letter invoice plan slides song")
_ENDINGS = Words.parse("txt pdf png zip doc csv")
_ROOMS = Words.parse("kitchen bedroom office bathroom hallway garage cellar study nursery attic")
_CURRENCIES = Words.parse("EUR USD GBP JPY CHF SEK NOK CAD AUD INR")
_LANGUAGES = Words.parse("German French Spanish Italian Swedish Polish Dutch Greek Turkish Danish")
_CUISINES = Words.parse("Italian Thai Indian Mexican Greek Korean Turkish French Chinese Vegan")
_SPORTS = Words.parse("running tennis swimming yoga cycling rowing boxing hiking climbing judo")
_ITEMS = Words.parse("apples pens socks candles bananas mugs lemons towels shirts batteries")


def _from(words: Words) -> Draw:
    return words.pick


def _int(low: int, high: int) -> Draw:
    """Every fifth number of the range is kept from training, where the range is wide enough."""

    def draw(rng: random.Random, held_out: bool) -> int:
        while True:
            n = rng.randint(low, high)
            if high - low < 20 or (n % 5 == 4) == held_out:
                return n

    return draw


def _number(rng: random.Random, held_out: bool) -> float | int:
    n = _int(2, 900)(rng, held_out)
    assert isinstance(n, int)
    return n if rng.random() < 0.6 else n + rng.choice((0.5, 0.25, 0.75, 0.1, 0.9))


def _person(rng: random.Random, held_out: bool) -> str:
    first = FIRST_NAMES.pick(rng, held_out)
    return first if rng.random() < 0.5 else f"{first} {LAST_NAMES.pick(rng, held_out)}"


def _email(rng: random.Random, held_out: bool) -> str:
    first, last = FIRST_NAMES.pick(rng, held_out), LAST_NAMES.pick(rng, held_out)
    user = rng.choice((first, f"{first}.{last}", f"{first}{rng.randrange(10, 100)}"))
    return f"{user.lower()}@{_HOSTS.pick(rng, held_out)}"


def _phrase(rng: random.Random, held_out: bool) -> str:
    noun = _NOUNS.pick(rng, held_out)
    return noun if rng.random() < 0.3 else f"{_ADJECTIVES.pick(rng, held_out)} {noun}"


def _path(rng: random.Random, held_out: bool) -> str:
    name = f"{_FILES.pick(rng, held_out)}{rng.choice(('', str(rng.randrange(2, 60))))}"
    return f"{name}.{_ENDINGS.pick(rng, held_out)}"


def _code(rng: random.Random, held_out: bool) -> str:
    digits = str(rng.randrange(1000, 100_000))
    return rng.choice(
        (digits, f"{rng.choice(_LETTERS)}{digits}", f"{digits}-{rng.choice(_LETTERS)}")
    )


def _ticker(rng: random.Random, held_out: bool) -> str:
    return "".join(rng.choice(_LETTERS) for _ in range(rng.choice((3, 4))))


def _time(rng: random.Random, held_out: bool) -> str:
    return f"{rng.randrange(24)}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45)):02}"


def _date(rng: random.Random, held_out: bool) -> str:
    return f"{rng.choice((2026, 2027))}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"


KINDS: dict[str, Draw] = {
    "city": _from(CITIES),
    "person": _person,
    "email": _email,
    "phrase": _phrase,
    "path": _path,
    "code": _code,
    "ticker": _ticker,
    "time": _time,
    "date": _date,
    "room": _from(_ROOMS),
    "currency": _from(_CURRENCIES),
    "language": _from(_LANGUAGES),
    "cuisine": _from(_CUISINES),
    "sport": _from(_SPORTS),
    "thing": _from(_ITEMS),
    "int": _int(2, 240),
    "small": _int(2, 30),
    "digit": _int(1, 9),
    "percent": _int(1, 100),
    "number": _number,
}
VALUE_TYPES = dict.fromkeys(KINDS, "string") | {
    **dict.fromkeys(("int", "small", "digit", "percent"), "integer"),
    "number": "number",
}
