"""English word forms in small phrases: a person and a verb, a number and a noun."""

import random
from typing import NamedTuple

from ..draws import Operation, draw_name
from ..rows import Row, table
from ..words import pool, pool_part


class _Act(NamedTuple):
    person: str
    verb: str


class _Count(NamedTuple):
    number: int
    noun: str


def _act(rng: random.Random, split: str) -> tuple[str, _Act]:
    act = _Act(draw_name(rng, split)[0], rng.choice(pool_part(pool("verbs"), split)))
    return f"{act.person}, {act.verb}", act


def _count(rng: random.Random, split: str) -> tuple[str, _Count]:
    count = _Count(rng.randint(2, 20), rng.choice(pool_part(pool("nouns"), split)))
    return f"{count.number}, {count.noun}", count


def _noun(rng: random.Random, split: str) -> tuple[str, _Act]:
    act = _Act(draw_name(rng, split)[0], rng.choice(pool_part(pool("nouns"), split)))
    return f"{act.person}, {act.verb}", act


def _form(word: str, tag: str) -> str:
    from lemminflect import getInflection

    return str(getInflection(word, tag=tag)[0])


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


GRAMMAR: dict[str, Operation] = {
    **table(
        "sentences",
        _act,
        {
            "third-person": Row(
                lambda a: f"{a.person} {_form(a.verb, 'VBZ')}.",
                ("a present-tense sentence of person and verb", "say that the person does it"),
                ("what the person does, in the simple present",),
            ),
            "past-sentence": Row(
                lambda a: f"{a.person} {_form(a.verb, 'VBD')}.",
                ("a past-tense sentence of person and verb", "say that the person did it"),
                ("what the person did, in the simple past",),
            ),
            "future-sentence": Row(
                lambda a: f"{a.person} will {a.verb}.",
                ("a sentence with will of person and verb", "say that the person will do it"),
                ("what the person is going to do, with will",),
            ),
            "progressive": Row(
                lambda a: f"{a.person} is {_form(a.verb, 'VBG')}.",
                ("a sentence with is and -ing", "say that the person is doing it"),
                ("what the person is busy with",),
            ),
            "perfect": Row(
                lambda a: f"{a.person} has {_form(a.verb, 'VBN')}.",
                ("a present-perfect sentence", "say that the person has done it"),
                ("what the person has been through, with has",),
            ),
            "negation": Row(
                lambda a: f"{a.person} does not {a.verb}.",
                ("a sentence with does not", "say that the person does not do it"),
                ("what the person leaves undone",),
            ),
            "question": Row(
                lambda a: f"Does {a.person} {a.verb}?",
                ("a question with does", "ask whether the person does it"),
                ("how one would inquire about the person's doing",),
            ),
            "can-sentence": Row(
                lambda a: f"{a.person} can {a.verb}.",
                ("a sentence with can", "say that the person is able to do it, with can"),
                ("what the person is capable of",),
            ),
            "must-sentence": Row(
                lambda a: f"{a.person} must {a.verb}.",
                ("a sentence with must", "say that the person has to do it, with must"),
                ("what the person is obliged to do",),
            ),
            "wants-to": Row(
                lambda a: f"{a.person} wants to {a.verb}.",
                ("a sentence with wants to", "say that the person wishes to do it"),
                ("what the person desires to do",),
            ),
            "order-to": Row(
                lambda a: f"{a.verb.capitalize()}, {a.person}!",
                ("an order to the person, verb first", "command the person to do it"),
                ("what one shouts at the person",),
            ),
            "let-us": Row(
                lambda a: f"Let {a.person} {a.verb}.",
                ("a sentence that begins with Let", "allow the person to do it"),
                ("how one grants it to the person",),
            ),
        },
        formats=("plain", "quotes", "json", "tag"),
    ),
    **table(
        "noun-phrases",
        _count,
        {
            "counted-noun": Row(
                lambda c: f"{c.number} {_form(c.noun, 'NNS')}",
                ("the number before the plural", "count the noun in the plural"),
                ("so many of these things",),
            ),
            "there-are": Row(
                lambda c: f"There are {c.number} {_form(c.noun, 'NNS')}.",
                ("a sentence with There are", "say that so many are there"),
                ("how one states that they exist in this number",),
            ),
            "times-noun": Row(
                lambda c: f"{c.number}x {c.noun}",
                ("the number, an x and the noun", "write it as on a packing list"),
                ("the count with x, the word unchanged",),
            ),
            "noun-in-brackets": Row(
                lambda c: f"{c.noun} ({c.number})",
                ("the noun with its number in parentheses", "put the number in brackets last"),
                ("the word followed by its count in round brackets",),
            ),
        },
        formats=("plain", "quotes", "json", "tag"),
    ),
    **table(
        "noun-phrases",
        _noun,
        {
            "possessive": Row(
                lambda a: f"{a.person}'s {a.verb}",
                ("the thing as the person's own, with 's", "put the owner before the noun"),
                ("whose thing it is, in the genitive",),
            ),
            "owns-sentence": Row(
                lambda a: f"{a.person} has {_article(a.verb)}.",
                ("a sentence with has and a or an", "say that the person has one"),
                ("what the person owns, with its article",),
            ),
            "gave-sentence": Row(
                lambda a: f"I gave {a.person} the {a.verb}.",
                ("a sentence that begins with I gave", "say that I gave it to the person"),
                ("what I handed to whom",),
            ),
            "for-person": Row(
                lambda a: f"{_article(a.verb)} for {a.person}",
                ("the noun with a or an, for the person", "dedicate one to the person"),
                ("the thing with its article and for whom it is",),
            ),
            "where-is": Row(
                lambda a: f"Where is the {a.verb} of {a.person}?",
                ("a question where the person's thing is", "ask where the thing is, with of"),
                ("how one searches for what belongs to the person",),
            ),
        },
        formats=("plain", "quotes", "json", "tag"),
    ),
}
