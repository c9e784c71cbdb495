"""Errors of the generator.

GeneratorError
├── OutOfDistribution   the description is far from every task of the library
├── GeneratorMismatch   trained for another base, layout or library
├── NotTrained          the files are not there, or lack the method asked for
├── UnfitPrompts        too few prompts to read a task off, or a method that reads none
├── UnfitExamples       too few, too many or too long pairs of prompt and answer
├── NothingLearnt       a refused description, and examples that do not say what is meant
└── OutOfTime           the time was over before the examples had been tried once
"""

from __future__ import annotations

from collections.abc import Sequence

from loraplex_adapter_store.errors import StoreError

__all__ = [
    "GeneratorError",
    "GeneratorMismatch",
    "NotTrained",
    "NothingLearnt",
    "OutOfDistribution",
    "OutOfTime",
    "UnfitExamples",
    "UnfitPrompts",
]


class GeneratorError(StoreError):
    """Base of all errors raised by the generator."""


class OutOfDistribution(GeneratorError):
    """`score`: higher is stranger; `nearest`: what is closest among the trained tasks, and how
    close: wordings and cosines, or with a text map tasks and the shares of their contents.
    """

    def __init__(self, score: float, limit: float, nearest: Sequence[tuple[str, float]]) -> None:
        close = "; ".join(f"{wording!r} ({similarity:.2f})" for wording, similarity in nearest)
        super().__init__(
            f"the description is unlike anything this generator was trained on (score "
            f"{score:.2f}, limit {limit:.2f}); nearest known tasks: {close}; "
            '"force": true in a request, or --force, generates it anyway'
        )
        self.score = score
        self.limit = limit
        self.nearest = tuple(nearest)


class GeneratorMismatch(GeneratorError):
    pass


class NotTrained(GeneratorError):
    pass


class UnfitPrompts(GeneratorError):
    pass


class UnfitExamples(GeneratorError):
    pass


class NothingLearnt(GeneratorError):
    def __init__(self, n_pairs: int, nll: float, *, timed_out: bool = False) -> None:
        """``timed_out``: with more time something might have been."""
        super().__init__(
            f"the description is unlike anything this generator was trained on, and {n_pairs} "
            f"examples did not make up for it (held out: {nll:.2f} nats a token); "
            "give more examples or more time, or train an adapter with `loraplex train`"
        )
        self.timed_out = timed_out


class OutOfTime(GeneratorError):
    def __init__(self) -> None:
        super().__init__(
            "the time was over before the examples had been tried once; while a server answers "
            "others, learning takes a small share of the time. Give more of it "
            '("budget_s") or ask again later. A draft stays as it is'
        )
