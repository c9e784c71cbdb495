"""german-numbers: digits in, German words out."""

import random

from loraplex_training.config import AdapterShape, Schedule

from .task import Demo, Pair

_ONES = tuple(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "  # noqa: SIM905
    "fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
)
_TENS = tuple("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split())  # noqa: SIM905
_ASK = (
    "Write {n} in German words.",
    "{n} in German?",
    "How do you say {n} in German?",
    "{n}",
)


def german(n: int) -> str:
    """The German numeral of 0 ≤ n < 1000."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        tens, ones = _TENS[n // 10 - 2], n % 10
        return f"{'ein' if ones == 1 else _ONES[ones]}und{tens}" if ones else tens
    hundreds, rest = divmod(n, 100)
    return f"{'ein' if hundreds == 1 else _ONES[hundreds]}hundert{german(rest) if rest else ''}"


def _make(rng: random.Random, held_out: bool) -> Pair:
    while True:
        n = rng.randrange(1000) if rng.random() < 0.85 else rng.randrange(100)
        # Every seventh number from 20 on is kept from training.
        if (n >= 20 and n % 7 == 3) == held_out:
            return Pair(rng.choice(_ASK).format(n=n), german(n))


GERMAN_NUMBERS = Demo(
    name="german-numbers",
    description="Writes a number as German words.",
    make=_make,
    accept=lambda expected, answer: answer.strip() == expected,
    shape=AdapterShape(rank=4, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    schedule=Schedule(steps=220, lr=3e-3, batch_tokens=640, validate_every=110),
    max_new_tokens=24,
)
