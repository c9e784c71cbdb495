"""A task = operation × language × format, with seeded examples and wordings."""

import random
from dataclasses import dataclass
from typing import Self

from loraplex_generation.examples import Example

from .formats import FORMATS
from .operations import LANGUAGES, OPERATIONS

N_DESCRIPTIONS = 16  # training wordings of a task
N_TEST_DESCRIPTIONS = 6


@dataclass(frozen=True, slots=True)
class Task:
    """An operation, in a language if it has one, and the format of its answers."""

    operation: str
    language: str  # "" if the operation has none
    format: str

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the task that is called `name`. Raises ValueError for one that does not exist."""
        content, _, answer_format = name.partition("/")
        operation, _, language = content.partition(".")
        if operation not in OPERATIONS or answer_format not in FORMATS:
            raise ValueError(
                f"no task {name!r}: operations are {sorted(OPERATIONS)}, formats {sorted(FORMATS)}"
            )
        return cls(operation, language, answer_format)

    @property
    def content(self) -> str:
        """The operation and its language: the task without its format."""
        return f"{self.operation}.{self.language}" if self.language else self.operation

    @property
    def name(self) -> str:
        return f"{self.content}/{self.format}"

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
        operation, answer_format = OPERATIONS[self.operation], FORMATS[self.format]
        return self._draw(operation.wordings, answer_format.suffixes, N_DESCRIPTIONS, "train")

    def test_descriptions(self) -> list[str]:
        """Wordings whose operation and format phrases never occur in training."""
        operation, answer_format = OPERATIONS[self.operation], FORMATS[self.format]
        return self._draw(
            operation.test_wordings, answer_format.test_suffixes, N_TEST_DESCRIPTIONS, "test"
        )

    def _draw(
        self, wordings: tuple[str, ...], suffixes: tuple[str, ...], n: int, part: str
    ) -> list[str]:
        rng = random.Random(f"{self.name}:{part}:descriptions")
        pairs = [(wording, suffix) for wording in wordings for suffix in suffixes]
        rng.shuffle(pairs)
        language = LANGUAGES.get(self.language, "")
        return [wording.format(language=language) + suffix for wording, suffix in pairs[:n]]
