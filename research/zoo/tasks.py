"""A task = operation × language × format, with seeded examples, wordings and an exact scorer."""

import random
from typing import Self

from loraplex_generation.examples import Example
from research.zoo.dressings import TaskName

from .formats import FORMATS
from .languages import LANGUAGES
from .operations import OPERATIONS

__all__ = ["Example", "Task", "casual", "exact"]

N_DESCRIPTIONS = 16  # training wordings of a task
N_TEST_DESCRIPTIONS = 6


class Task(TaskName):
    """A task: one operation in one language and one format."""

    __slots__ = ()

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the task that is called `name`. Raises ValueError for one that does not exist."""
        task = super().parse(name)
        if task.operation not in OPERATIONS or task.format not in FORMATS:
            raise ValueError(
                f"no task {name!r}: operations are {sorted(OPERATIONS)}, formats {sorted(FORMATS)}"
            )
        return task

    @property
    def family(self) -> str:
        return OPERATIONS[self.operation].family

    def examples(self, split: str, n: int, *, seed: int = 0) -> list[Example]:
        """`n` examples, distinct where the pool allows, the same on every machine and run."""
        rng = random.Random(f"{self.content}:{split}:{seed}")  # one content, the same inputs
        seen: dict[str, str] = {}
        tries = 0
        while len(seen) < n and tries < 20 * n:
            tries += 1
            prompt, answer = OPERATIONS[self.operation].draw(rng, split, self.language)
            seen.setdefault(prompt, answer)
        dress = FORMATS[self.format].dress
        return [Example(prompt, dress(answer)) for prompt, answer in seen.items()]

    def descriptions(self) -> list[str]:
        """The wordings for training."""
        return [self._fill(wording) + suffix for wording, suffix in self.phrases()]

    def casual_descriptions(self) -> list[str]:
        """The same tasks as people type them; for maps that read text, beside the others."""
        rng = random.Random(f"{self.name}:casual")
        return [casual(self._fill(wording), suffix, rng) for wording, suffix in self.phrases()]

    def test_descriptions(self) -> list[str]:
        """Wordings whose operation and format phrases never occur in training."""
        operation, dressing = OPERATIONS[self.operation], FORMATS[self.format]
        pairs = self._draw_pairs(
            operation.test_wordings, dressing.test_suffixes, N_TEST_DESCRIPTIONS, "test"
        )
        return [self._fill(wording) + suffix for wording, suffix in pairs]

    def phrases(self) -> list[tuple[str, str]]:
        """(operation's phrase, before the language is filled in; format's) of each description."""
        operation, dressing = OPERATIONS[self.operation], FORMATS[self.format]
        return self._draw_pairs(operation.wordings, dressing.suffixes, N_DESCRIPTIONS, "train")

    def _draw_pairs(
        self, wordings: tuple[str, ...], suffixes: tuple[str, ...], n: int, part: str
    ) -> list[tuple[str, str]]:
        rng = random.Random(f"{self.name}:{part}:descriptions")
        pairs = [(w, s) for w in wordings for s in suffixes]
        rng.shuffle(pairs)
        return pairs[:n]

    def _fill(self, wording: str) -> str:
        return wording.format(language=LANGUAGES.get(self.language, ""))


def casual(wording: str, suffix: str, rng: random.Random) -> str:
    """An operation's phrase and a format's as somebody in a hurry types them."""
    start = wording[0].lower() + wording[1:]
    bare = suffix.strip(" ,.")
    styles = [
        f"{wording}{suffix}".lower(),
        f"please {start}{suffix}",
        f"can you {start}{suffix}?",
        f"I need an adapter that does this: {start}{suffix}",
        f"{start} {bare.lower()} pls",
        f"{bare[:1].upper()}{bare[1:]}: {start}" if bare else start,
    ]
    return rng.choice(styles)


def exact(reply: str, answer: str) -> bool:
    """The scorer: the reply is the answer, up to white space at its ends."""
    return reply.strip() == answer
