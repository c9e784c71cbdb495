"""What a demo adapter is: generated examples, held-out prompts and a check that says yes or no."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loraplex_training.config import AdapterShape, Schedule
from loraplex_training.examples import Chat, Message, Tool


class Pair(NamedTuple):
    prompt: str
    answer: str
    tools: tuple[Tool, ...] = ()
    turns: tuple[Message, ...] = ()  # between the two: a call and its result

    def chat(self) -> list[Message]:
        """What the answer follows."""
        return [Message(role="user", content=self.prompt), *self.turns]


class Words:
    """A word list whose every fifth word is kept from training: ``pick`` draws from one side."""

    def __init__(self, words: Sequence[str]) -> None:
        self._train = [word for i, word in enumerate(words) if i % 5 != 4]
        self._held_out = [word for i, word in enumerate(words) if i % 5 == 4]

    @classmethod
    def parse(cls, text: str, sep: str = " ") -> Words:
        return cls(text.split(sep))

    def pick(self, rng: random.Random, held_out: bool) -> str:
        return rng.choice(self._held_out if held_out else self._train)

    def sides(self) -> tuple[frozenset[str], frozenset[str]]:
        return frozenset(self._train), frozenset(self._held_out)


@dataclass(frozen=True, slots=True)
class Course:
    """Training that goes on from the weights of what came before, on other data."""

    name: str
    make: Callable[[random.Random, bool], Pair]
    schedule: Schedule
    n_examples: int


@dataclass(frozen=True, slots=True)
class Demo:
    """``make(rng, held_out)`` yields one example; what it draws from is disjoint by ``held_out``.

    ``accept(expected, answer)`` decides whether an answer shows the effect.
    """

    name: str
    description: str
    make: Callable[[random.Random, bool], Pair]
    accept: Callable[[str, str], bool]
    shape: AdapterShape
    schedule: Schedule
    n_examples: int = 1200
    max_new_tokens: int = 40
    chat_template: str | None = None  # None = the base's
    later: tuple[Course, ...] = ()  # after that of ``make``, which is the first
    defaults: Mapping[str, object] = field(default_factory=dict)  # of the card
    shown: tuple[str, ...] = ()  # prompts of the card, where those of training say too little


def chats(demo: Demo, n: int) -> list[Chat]:
    """``n`` distinct chats, the same ones for the same arguments."""
    return [_chat(pair) for pair in _pairs(demo, n, seed=0, held_out=False)]


def later_chats(demo: Demo, course: Course) -> list[Chat]:
    """The training data of one of the later courses, the same ones each time."""
    rng = random.Random(f"{demo.name}-{course.name}")
    return [_chat(p) for p in _distinct(course.make, rng, course.n_examples, held_out=False)]


def shown_prompts(demo: Demo, n: int) -> tuple[str, ...]:
    """Example prompts for the card: by them ``adapter: "auto"`` knows what the adapter is for."""
    return demo.shown or tuple(pair.prompt for pair in _pairs(demo, n, seed=2, held_out=False))


def held_out_pairs(demo: Demo, n: int) -> list[Pair]:
    """Prompts that training never saw, with the answer that is expected."""
    return _pairs(demo, n, seed=1, held_out=True)


def _pairs(demo: Demo, n: int, seed: int, held_out: bool) -> list[Pair]:
    rng = random.Random(f"{demo.name}-{seed}-{held_out}")
    return _distinct(demo.make, rng, n, held_out=held_out)


def _distinct(
    make: Callable[[random.Random, bool], Pair], rng: random.Random, n: int, *, held_out: bool
) -> list[Pair]:
    pairs: dict[str, Pair] = {}
    for _ in range(40 * n):  # small domains run out: then there are fewer than n
        pair = make(rng, held_out)
        pairs.setdefault(pair.prompt, pair)
        if len(pairs) == n:
            break
    return list(pairs.values())


def _chat(pair: Pair) -> Chat:
    return Chat([*pair.chat(), Message(role="assistant", content=pair.answer)], pair.tools)
