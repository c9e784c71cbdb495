"""On the words of a phrase of four to six words."""

import random

from ..draws import Operation
from ..rows import Row, series, table
from ..words import pool, pool_part


def _words(rng: random.Random, split: str) -> tuple[str, list[str]]:
    """All of them different, and so are their lengths at the ends of the order."""
    while True:
        words = rng.sample(pool_part(pool("common"), split), rng.randint(4, 6))
        lengths = sorted(len(word) for word in words)
        if lengths[0] < lengths[1] and lengths[-2] < lengths[-1]:
            return " ".join(words), words


def _with_repetition(rng: random.Random, split: str) -> tuple[str, list[str]]:
    """One word comes twice in a row."""
    _, words = _words(rng, split)
    at = rng.randrange(len(words))
    words.insert(at, words[at])
    return " ".join(words), words


def _in_capitals(rng: random.Random, split: str) -> tuple[str, list[str]]:
    _, words = _words(rng, split)
    return " ".join(words).upper(), words


def _snake(rng: random.Random, split: str) -> tuple[str, list[str]]:
    words = rng.sample(pool_part(pool("common"), split), rng.randint(2, 4))
    return "_".join(words), words


def _camel(words: list[str]) -> str:
    return words[0] + "".join(word.capitalize() for word in words[1:])


PHRASES: dict[str, Operation] = {
    **series(
        "phrases",
        _words,
        "word-at",
        (1, 2, 3, 4),
        Row(
            lambda words, n: words[n - 1],
            ("the {nth} word of the phrase", "pick word number {n}"),
            ("which word comes {nth} in the phrase",),
        ),
    ),
    **series(
        "phrases",
        _words,
        "word-from-end",
        (1, 2, 3),
        Row(
            lambda words, n: words[-n],
            ("the {nth} word counted from the end", "pick word number {n} from behind"),
            ("which word is {nth} when one counts backwards",),
        ),
    ),
    **series(
        "phrases",
        _words,
        "first-words",
        (2, 3),
        Row(
            lambda words, n: " ".join(words[:n]),
            ("the first {word} words of the phrase", "keep the first {n} words"),
            ("the opening {word} words",),
        ),
    ),
    **series(
        "phrases",
        _words,
        "drop-words",
        (1, 2, 3),
        Row(
            lambda words, n: " ".join(words[n:]),
            ("remove the first {word} word{s}", "leave out {word} word{s} at the start"),
            ("the phrase after its first {word} word{s}",),
        ),
    ),
    **table(
        "phrases",
        _words,
        {
            "words-reverse": Row(
                lambda words: " ".join(reversed(words)),
                ("reverse the order of the words", "the words from last to first"),
                ("the phrase read word by word from the end",),
            ),
            "words-sort": Row(
                lambda words: " ".join(sorted(words)),
                ("sort the words alphabetically", "the words in alphabetical order"),
                ("arrange the words as in a dictionary",),
            ),
            "words-sort-down": Row(
                lambda words: " ".join(sorted(words, reverse=True)),
                ("sort the words from z to a", "the words in reverse alphabetical order"),
                ("arrange the words backwards through the alphabet",),
            ),
            "words-by-length": Row(
                lambda words: " ".join(sorted(words, key=len)),
                ("sort the words by length, shortest first", "order the words by their length"),
                ("arrange the words from short to long, equals as they stand",),
            ),
            "longest-word": Row(
                lambda words: max(words, key=len),
                ("the longest word", "find the word with the most letters"),
                ("which word is longest",),
            ),
            "shortest-word": Row(
                lambda words: min(words, key=len),
                ("the shortest word", "find the word with the fewest letters"),
                ("which word is shortest",),
            ),
            "words-count": Row(
                lambda words: str(len(words)),
                ("the number of words", "count the words of the phrase"),
                ("how many words there are",),
            ),
            "words-swap-ends": Row(
                lambda words: " ".join([words[-1], *words[1:-1], words[0]]),
                ("swap the first and the last word", "exchange the outer words"),
                ("the phrase with its end words traded",),
            ),
            "words-outer": Row(
                lambda words: f"{words[0]} {words[-1]}",
                ("the first and the last word", "keep the outer two words alone"),
                ("the opening word followed by the closing word",),
            ),
            "words-odd": Row(
                lambda words: " ".join(words[::2]),
                ("every other word, starting with the first", "keep words one, three, five"),
                ("the words in odd positions",),
            ),
            "words-acronym": Row(
                lambda words: "".join(word[0] for word in words).upper(),
                ("the acronym of the phrase", "join the first letters as capitals"),
                ("an abbreviation made of the initials",),
            ),
            "words-lengths": Row(
                lambda words: " ".join(str(len(word)) for word in words),
                ("the length of each word", "replace each word by its number of letters"),
                ("how many letters every word has, in order",),
            ),
            "words-numbered": Row(
                lambda words: " ".join(f"{i}.{word}" for i, word in enumerate(words, 1)),
                ("number the words as 1.this 2.that", "put a number and a dot before each word"),
                ("label the words with running numbers",),
            ),
            "words-rotate": Row(
                lambda words: " ".join([*words[1:], words[0]]),
                ("move the first word to the end", "rotate the words by one to the left"),
                ("the phrase with its opening word put last",),
            ),
        },
    ),
    **table(
        "phrases",
        _with_repetition,
        {
            "words-unique": Row(
                lambda words: " ".join(dict.fromkeys(words)),
                ("remove the repeated word", "keep each word only once"),
                ("the phrase without its doubled word",),
            ),
            "words-repeated": Row(
                lambda words: next(word for word in words if words.count(word) > 1),
                ("the word that comes twice", "find the repeated word"),
                ("which word is written double",),
            ),
        },
    ),
    **table(
        "casing",
        _words,
        {
            "title-case": Row(
                lambda words: " ".join(word.capitalize() for word in words),
                ("write the phrase in title case", "capitalise every word"),
                ("each word with a capital at its start",),
            ),
            "sentence-case": Row(
                lambda words: " ".join(words).capitalize() + ".",
                ("make a sentence: capital first, full stop last", "punctuate it as a sentence"),
                ("the phrase with a leading capital and a final dot",),
            ),
            "snake-case": Row(
                lambda words: "_".join(words),
                ("write the phrase in snake_case", "join the words with underscores"),
                ("a variable name in Python's style",),
            ),
            "kebab-case": Row(
                lambda words: "-".join(words),
                ("write the phrase in kebab-case", "join the words with hyphens"),
                ("a URL slug made of the words",),
            ),
            "camel-case": Row(
                _camel,
                ("write the phrase in camelCase", "a variable name in Java's style"),
                ("glue the words, capitals from the second word on",),
            ),
            "pascal-case": Row(
                lambda words: "".join(word.capitalize() for word in words),
                ("write the phrase in PascalCase", "a class name made of the words"),
                ("glue the words, each with a capital",),
            ),
            "constant-case": Row(
                lambda words: "_".join(words).upper(),
                ("write the phrase in CONSTANT_CASE", "a constant's name made of the words"),
                ("capitals with underscores, as environment variables have",),
            ),
            "dot-case": Row(
                lambda words: ".".join(words),
                ("join the words with dots", "a dotted name made of the words"),
                ("put full stops in place of the spaces",),
            ),
            "path-case": Row(
                lambda words: "/" + "/".join(words),
                ("make a path of the words, starting with a slash", "a folder path of the words"),
                ("the words as an absolute path",),
            ),
            "no-spaces": Row(
                lambda words: "".join(words),
                ("remove the spaces", "write the words run together"),
                ("the phrase as one long word",),
            ),
            "plus-joined": Row(
                lambda words: "+".join(words),
                ("join the words with plus signs", "encode the phrase as a search query"),
                ("a plus sign between the words",),
            ),
            "first-word-capitals": Row(
                lambda words: " ".join([words[0].upper(), *words[1:]]),
                ("write only the first word in capitals", "shout the first word"),
                ("upper case for the opening word and nothing else",),
            ),
            "hash-tags": Row(
                lambda words: " ".join(f"#{word}" for word in words),
                ("make a hash tag of every word", "put # before each word"),
                ("the words as social media tags",),
            ),
        },
        formats=("plain", "json", "quotes", "tag"),
    ),
    **table(
        "casing",
        _in_capitals,
        {
            "lower-case": Row(
                lambda words: " ".join(words),
                ("write the phrase in lower case", "turn capitals into small letters"),
                ("the phrase without any capital",),
            ),
        },
        formats=("plain", "json", "quotes", "tag"),
    ),
    **table(
        "casing",
        _snake,
        {
            "snake-to-words": Row(
                lambda words: " ".join(words),
                ("split the snake_case name into words", "put spaces for underscores"),
                ("the name as a plain phrase",),
            ),
            "snake-to-camel": Row(
                _camel,
                ("convert snake_case to camelCase", "rename the variable in Java's style"),
                ("the same name without underscores, inner words capitalised",),
            ),
            "snake-to-kebab": Row(
                lambda words: "-".join(words),
                ("convert snake_case to kebab-case", "put hyphens for underscores"),
                ("the same name with dashes",),
            ),
        },
        formats=("plain", "json", "quotes", "tag"),
    ),
}
