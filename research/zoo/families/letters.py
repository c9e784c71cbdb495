"""On the letters of one word."""

import random
from functools import cache

from ..draws import Operation
from ..rows import Row, series, table
from ..words import pool, pool_part

_VOWELS = "aeiou"


def _word(rng: random.Random, split: str) -> tuple[str, str]:
    word = rng.choice(_words(split))
    return word, word


@cache
def _words(split: str) -> list[str]:
    """Five letters or more, a vowel among them."""
    words = pool_part(pool("common"), split)
    return [word for word in words if len(word) >= 5 and set(word) & set(_VOWELS)]


def _pig_latin(word: str) -> str:
    start = next(i for i, letter in enumerate(word) if letter in _VOWELS)
    return f"{word[start:]}{word[:start]}ay"


def _shifted(word: str, n: int) -> str:
    return "".join(chr((ord(letter) - 97 + n) % 26 + 97) for letter in word)


LETTERS: dict[str, Operation] = {
    **series(
        "letters",
        _word,
        "first-letters",
        (1, 2, 3, 4),
        Row(
            lambda w, n: w[:n],
            ("the first {word} letter{s} of the word", "keep only the first {n} letter{s}"),
            ("the {word}-letter beginning of the word", "cut the word down to its first {n}"),
        ),
    ),
    **series(
        "letters",
        _word,
        "last-letters",
        (1, 2, 3, 4),
        Row(
            lambda w, n: w[-n:],
            ("the last {word} letter{s} of the word", "keep only the final {n} letter{s}"),
            ("the {word}-letter ending of the word",),
        ),
    ),
    **series(
        "letters",
        _word,
        "drop-first",
        (1, 2, 3, 4),
        Row(
            lambda w, n: w[n:],
            ("remove the first {word} letter{s}", "drop {word} letter{s} at the start"),
            ("the word without its {word} leading letter{s}",),
        ),
    ),
    **series(
        "letters",
        _word,
        "drop-last",
        (1, 2, 3, 4),
        Row(
            lambda w, n: w[:-n],
            ("remove the last {word} letter{s}", "cut {word} letter{s} off the end"),
            ("the word without its {word} closing letter{s}",),
        ),
    ),
    **series(
        "letters",
        _word,
        "letter-at",
        (2, 3, 4, 5),
        Row(
            lambda w, n: w[n - 1],
            ("the {nth} letter of the word", "the letter in position {n}"),
            ("which letter stands in place number {n}",),
        ),
    ),
    **series(
        "ciphers",
        _word,
        "shift",
        (1, 2, 3),
        Row(
            _shifted,
            ("shift every letter {n} forward in the alphabet", "apply a Caesar cipher of {n}"),
            ("encode the word by moving each letter {word} on",),
        ),
    ),
    **table(
        "letters",
        _word,
        {
            "word-reverse": Row(
                lambda w: w[::-1],
                ("spell the word backwards", "reverse the letters of the word"),
                ("the mirrored spelling of the word",),
            ),
            "letter-count": Row(
                lambda w: str(len(w)),
                ("the number of letters in the word", "count the letters"),
                ("how long the word is, in letters",),
            ),
            "vowel-count": Row(
                lambda w: str(sum(letter in _VOWELS for letter in w)),
                ("the number of vowels in the word", "count the vowels a, e, i, o, u"),
                ("how many vowels the word contains",),
            ),
            "without-vowels": Row(
                lambda w: "".join(letter for letter in w if letter not in _VOWELS),
                ("remove all vowels from the word", "the consonants of the word, in order"),
                ("the word with every a, e, i, o and u deleted",),
            ),
            "vowels": Row(
                lambda w: "".join(letter for letter in w if letter in _VOWELS),
                ("the vowels of the word, in order", "drop every consonant"),
                ("the word reduced to its vowels",),
            ),
            "first-vowel": Row(
                lambda w: next(letter for letter in w if letter in _VOWELS),
                ("the first vowel of the word", "find the earliest a, e, i, o or u"),
                ("which vowel comes first in the word",),
            ),
            "first-and-last": Row(
                lambda w: w[0] + w[-1],
                ("the first and the last letter together", "join the two outer letters"),
                ("the opening letter followed by the closing one",),
            ),
            "swap-ends": Row(
                lambda w: w[-1] + w[1:-1] + w[0],
                ("swap the first and the last letter", "exchange the outer letters of the word"),
                ("the word with its end letters traded",),
            ),
            "double-letters": Row(
                lambda w: "".join(2 * letter for letter in w),
                ("write every letter twice", "double each letter of the word"),
                ("the word with all letters repeated in place",),
            ),
            "sorted-letters": Row(
                lambda w: "".join(sorted(w)),
                ("sort the letters alphabetically", "the letters of the word from a to z"),
                ("arrange the letters in the order of the alphabet",),
            ),
            "unique-letters": Row(
                lambda w: "".join(dict.fromkeys(w)),
                ("keep each letter only once", "remove repeated letters"),
                ("the word without any letter that came before",),
            ),
            "capitalised": Row(
                lambda w: w.capitalize(),
                ("capitalise the word", "make the first letter a capital"),
                ("start the word with an upper-case letter",),
            ),
            "starred": Row(
                lambda w: w[0] + "*" * (len(w) - 1),
                (
                    "hide all but the first letter with stars",
                    "mask the word after its first letter",
                ),
                ("censor the word, leaving the first letter visible",),
            ),
            "vowels-starred": Row(
                lambda w: "".join("*" if letter in _VOWELS else letter for letter in w),
                ("replace every vowel with a star", "put * in place of vowels"),
                ("mask the vowels with asterisks",),
            ),
            "middle-letter": Row(
                lambda w: w[len(w) // 2],
                ("the middle letter, the right one of two", "the letter at half the length"),
                ("which letter stands in the middle (right of centre if even)",),
            ),
            "abbreviated": Row(
                lambda w: f"{w[0]}{len(w) - 2}{w[-1]}",
                ("abbreviate like i18n", "first letter, number of letters between, last letter"),
                ("shorten it as numeronyms do",),
            ),
        },
    ),
    **table(
        "spelling",
        _word,
        {
            f"spell-{name}": Row(
                lambda w, mark=mark: mark.join(w),
                (f"spell the word with {told} between the letters", f"separate letters by {told}"),
                (f"the letters one by one, {told} in between",),
            )
            for name, mark, told in (
                ("spaces", " ", "spaces"),
                ("hyphens", "-", "hyphens"),
                ("dots", ".", "dots"),
                ("commas", ", ", "a comma and a space"),
                ("slashes", "/", "slashes"),
                ("underscores", "_", "underscores"),
            )
        },
    ),
    **table(
        "ciphers",
        _word,
        {
            "pig-latin": Row(
                _pig_latin,
                ("translate the word into Pig Latin", "move the start to the end and add ay"),
                ("how the word sounds in Pig Latin",),
            ),
            "atbash": Row(
                lambda w: "".join(chr(219 - ord(letter)) for letter in w),
                ("swap a with z, b with y and so on", "encode the word with the Atbash cipher"),
                ("mirror each letter in the alphabet",),
            ),
            "leet": Row(
                lambda w: w.translate(str.maketrans("aeio", "4310")),
                ("write a as 4, e as 3, i as 1 and o as 0", "turn the word into leetspeak"),
                ("the word in hacker spelling with digits for a, e, i, o",),
            ),
            "first-position": Row(
                lambda w: str(ord(w[0]) - 96),
                (
                    "the place of the first letter in the alphabet",
                    "number the first letter, a is 1",
                ),
                ("which number the initial has when a counts as 1",),
            ),
            "doubled-e": Row(
                lambda w: w.replace("e", "ee"),
                ("double every e", "write each e twice and leave the rest"),
                ("the word with ee wherever there is an e",),
            ),
            "a-to-o": Row(
                lambda w: w.replace("a", "o"),
                ("replace every a by o", "turn each a into an o"),
                ("the word with o wherever there was an a",),
            ),
        },
    ),
    **series(
        "repetition",
        _word,
        "repeat",
        (2, 3, 4, 5),
        Row(
            lambda w, n: " ".join([w] * n),
            ("repeat the word {word} times", "say it {n} times with spaces between"),
            ("the same word written {word} times over",),
        ),
    ),
    **series(
        "repetition",
        _word,
        "repeat-joined",
        (2, 3, 4),
        Row(
            lambda w, n: w * n,
            ("repeat the word {word} times without spaces", "write it {n} times run together"),
            ("the word glued to itself, {word} copies",),
        ),
    ),
}
