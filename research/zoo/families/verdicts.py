"""A verdict or a choice: yes or no, a label, or one of two."""

import itertools
import random
from datetime import date

from ..draws import Operation, draw_day, draw_name, draw_number
from ..languages import cardinal
from ..rows import Row, table
from ..words import pool, pool_part

_SPOKEN = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}


def _word(rng: random.Random, split: str) -> tuple[str, str]:
    word = rng.choice(pool_part(pool("common"), split))
    return word, word


def _two_words(rng: random.Random, split: str) -> tuple[str, tuple[str, str]]:
    """Of different lengths."""
    while True:
        first, second = rng.sample(pool_part(pool("common"), split), 2)
        if len(first) != len(second):
            return f"{first} or {second}", (first, second)


def _same_or_not(rng: random.Random, split: str) -> tuple[str, bool]:
    first, second = rng.sample(pool_part(pool("common"), split), 2)
    is_same = rng.random() < 0.5
    return f"{first} and {first if is_same else second}", is_same


def _number(rng: random.Random, split: str) -> tuple[str, int]:
    number = draw_number(rng, split, 2, 1999)
    return str(number), number


def _signed(rng: random.Random, split: str) -> tuple[str, int]:
    number = draw_number(rng, split, 1, 1999) * rng.choice((-1, 1))
    return str(number), number


def _two_numbers(rng: random.Random, split: str) -> tuple[str, tuple[int, int]]:
    first = draw_number(rng, split, 1, 999)
    second = first if rng.random() < 0.2 else draw_number(rng, split, 1, 999)
    return f"{first} ? {second}", (first, second)


def _day(rng: random.Random, split: str) -> tuple[str, date]:
    day = draw_day(rng, split)
    return day.isoformat(), day


def _thing(rng: random.Random, split: str) -> tuple[str, str]:
    """A food, city or person, four times out of five beside a word that says nothing."""
    kind = rng.choice(("food", "city", "person"))
    if kind == "person":
        name = draw_name(rng, split)[0]
    else:
        name = rng.choice(pool_part(pool({"food": "foods", "city": "cities"}[kind]), split))
    other = rng.choice(pool_part(pool("common"), split))
    return f"{other}: {name}", kind


def _spoken(rng: random.Random, split: str) -> tuple[str, str]:
    language = rng.choice(list(_SPOKEN))
    return cardinal(draw_number(rng, split, 21, 999), language), _SPOKEN[language]


def _sentence(rng: random.Random, split: str) -> tuple[str, str]:
    words = rng.sample(pool_part(pool("common"), split), rng.randint(3, 5))
    mark = rng.choice((".", "?", "!"))
    return " ".join(words).capitalize() + mark, mark


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def _sign(pair: tuple[int, int]) -> str:
    first, second = pair
    return "<" if first < second else ">" if first > second else "="


VERDICTS: dict[str, Operation] = {
    **table(
        "word-verdicts",
        _word,
        {
            "ends-with-e": Row(
                lambda w: _yes(w.endswith("e")),
                ("whether the word ends with e, yes or no", "say yes if the last letter is e"),
                ("if there is an e at the end: yes or no",),
            ),
            "has-double": Row(
                lambda w: _yes(any(a == b for a, b in itertools.pairwise(w))),
                (
                    "whether two equal letters stand together, yes or no",
                    "say yes to double letters",
                ),
                ("if any letter is doubled: yes or no",),
            ),
            "contains-a": Row(
                lambda w: _yes("a" in w),
                ("whether there is an a in the word, yes or no", "say yes if the word has an a"),
                ("if the letter a occurs: yes or no",),
            ),
            "is-long": Row(
                lambda w: "long" if len(w) > 6 else "short",
                ("long for words of more than six letters, else short", "call it long or short"),
                ("what kind of word it is: long from seven letters on, else short",),
            ),
            "letter-parity": Row(
                lambda w: "odd" if len(w) % 2 else "even",
                ("whether the number of letters is odd or even", "say odd or even for the length"),
                ("the parity of the word's length",),
            ),
            "half-of-alphabet": Row(
                lambda w: "first" if w[0] < "n" else "second",
                ("the half of the alphabet that it starts in, first or second", "first for a to m"),
                ("first or second: in which half of a dictionary the word is",),
            ),
        },
    ),
    **table(
        "choices",
        _two_words,
        {
            "longer-word": Row(
                lambda p: max(p, key=len),
                ("the longer of the two words", "pick the word with more letters"),
                ("which of the two is longer",),
            ),
            "shorter-word": Row(
                lambda p: min(p, key=len),
                ("the shorter of the two words", "pick the word with fewer letters"),
                ("which of the two is shorter",),
            ),
            "earlier-word": Row(
                lambda p: min(p),
                ("the word that comes first in the alphabet", "pick the alphabetically first"),
                ("which of the two a dictionary lists first",),
            ),
            "later-word": Row(
                lambda p: max(p),
                ("the word that comes last in the alphabet", "pick the alphabetically last"),
                ("which of the two a dictionary lists last",),
            ),
            "first-option": Row(
                lambda p: p[0],
                ("the first of the two options", "choose what is offered first"),
                ("what stands before the or",),
            ),
            "second-option": Row(
                lambda p: p[1],
                ("the second of the two options", "choose what is offered last"),
                ("what stands after the or",),
            ),
        },
    ),
    **table(
        "choices",
        _same_or_not,
        {
            "same-or-not": Row(
                lambda is_same: "same" if is_same else "different",
                ("same or different for the two words", "compare the words: same or different"),
                ("if both words are equal: same, else different",),
            ),
        },
    ),
    **table(
        "number-verdicts",
        _number,
        {
            "parity": Row(
                lambda n: "odd" if n % 2 else "even",
                ("whether the number is odd or even", "say odd or even"),
                ("the parity of the number",),
            ),
            "by-three": Row(
                lambda n: _yes(n % 3 == 0),
                ("whether three divides the number, yes or no", "say yes if it is a multiple of 3"),
                ("if it can be shared by three: yes or no",),
            ),
            "over-thousand": Row(
                lambda n: _yes(n > 1000),
                ("whether the number is above 1000, yes or no", "say yes if it exceeds 1000"),
                ("if it is more than a thousand: yes or no",),
            ),
            "size-class": Row(
                lambda n: "small" if n < 100 else "medium" if n < 1000 else "large",
                (
                    "small below 100, medium below 1000, else large",
                    "class the number as small, medium or large by its number of digits",
                ),
                ("its size in words: up to two digits small, three medium, four large",),
            ),
            "fizz-buzz": Row(
                lambda n: ("fizz" if n % 3 == 0 else "") + ("buzz" if n % 5 == 0 else "") or str(n),
                ("play fizz buzz with the number", "fizz for 3, buzz for 5, else the number"),
                ("what one says at this number in the game of fizz buzz",),
            ),
        },
        formats=("plain", "json", "quotes", "tag", "sentence"),
    ),
    **table(
        "number-verdicts",
        _signed,
        {
            "sign-word": Row(
                lambda n: "negative" if n < 0 else "positive",
                ("whether the number is positive or negative", "name the sign of the number"),
                ("on which side of zero it lies: positive or negative",),
            ),
            "absolute": Row(
                lambda n: str(abs(n)),
                ("the absolute value", "drop the sign of the number"),
                ("how far it is from zero",),
            ),
        },
        formats=("plain", "json", "quotes", "tag", "sentence"),
    ),
    **table(
        "number-verdicts",
        _two_numbers,
        {
            "compare-sign": Row(
                _sign,
                (
                    "the sign <, > or = between the numbers",
                    "replace the question mark by <, > or =",
                ),
                ("which comparison sign belongs there",),
            ),
            "compare-word": Row(
                lambda p: {"<": "less", ">": "greater", "=": "equal"}[_sign(p)],
                (
                    "less, greater or equal for the first number",
                    "compare first and second in a word",
                ),
                ("how the left number relates to the right: less, greater, equal",),
            ),
        },
        formats=("plain", "json", "quotes", "tag", "sentence"),
    ),
    **table(
        "date-verdicts",
        _day,
        {
            "is-weekend": Row(
                lambda day: _yes(day.weekday() >= 5),
                (
                    "whether the date falls on a weekend, yes or no",
                    "say yes for Saturday or Sunday",
                ),
                ("if one is off work that day by the calendar: yes or no",),
            ),
            "before-2000": Row(
                lambda day: "before" if day.year < 2000 else "after",
                ("before for years under 2000, else after", "place the date: before or after 2000"),
                ("on which side of the millennium's year it lies: before or after",),
            ),
            "summer-time": Row(
                lambda day: _yes(4 <= day.month <= 9),
                ("yes for April to September, else no", "say yes in the summer half-year"),
                ("if the month lies from 4 to 9: yes or no",),
            ),
        },
        formats=("plain", "json", "quotes", "tag", "sentence"),
    ),
    **table(
        "labels-of-things",
        _thing,
        {
            "kind-of-thing": Row(
                lambda kind: kind,
                ("food, city or person for what follows the colon", "label the last word's kind"),
                ("what sort of thing is named after the colon: food, city, person",),
            ),
            "edible": Row(
                lambda kind: _yes(kind == "food"),
                ("whether one can eat what follows the colon, yes or no", "say yes to food"),
                ("if the thing after the colon belongs on a plate: yes or no",),
            ),
        },
    ),
    **table(
        "languages-of-texts",
        _spoken,
        {
            "which-language": Row(
                lambda language: language,
                ("the language that the number is spelled in", "name the language of the words"),
                ("in which tongue the number is written",),
            ),
        },
    ),
    **table(
        "sentence-verdicts",
        _sentence,
        {
            "sentence-kind": Row(
                lambda mark: {".": "statement", "?": "question", "!": "exclamation"}[mark],
                ("statement, question or exclamation", "name the kind of sentence by its mark"),
                ("what the sentence is, judged by its last sign",),
            ),
            "is-question": Row(
                lambda mark: _yes(mark == "?"),
                ("whether it is a question, yes or no", "say yes if it ends in a question mark"),
                ("if an answer is expected: yes or no",),
            ),
        },
    ),
}
