"""Errors of the generator.

GeneratorError
├── OutOfDistribution   the description is far from every trained task
├── GeneratorMismatch   trained for another base or layout, or of another format
├── NotTrained          the files are missing, or lack the requested method
├── UnfitExpert         an adapter that cannot be mixed with others
├── UnfitPrompts        too few prompts, or a method that reads none
├── UnfitExamples       too few, too many or too long pairs of prompt and answer
│   └── BudgetTooShort  no time for one score
├── NothingLearnt       training on examples gained nothing, and the description is refused
└── OutOfTime           the time was over before a first score
"""

from collections.abc import Sequence

from loraplex_adapter_store.errors import StoreError


class GeneratorError(StoreError):
    """Base of all errors raised by the generator."""


class OutOfDistribution(GeneratorError):
    """A refusal with its score (higher is stranger), the limit and the nearest trained tasks.

    The numbers of `nearest` are cosines.
    """

    def __init__(self, score: float, limit: float, nearest: Sequence[tuple[str, float]]) -> None:
        close = "; ".join(f"{wording!r} ({similarity:.2f})" for wording, similarity in nearest)
        super().__init__(
            f"the description is unlike anything this generator was trained on (score "
            f"{score:.2f}, limit {limit:.2f}); nearest known tasks: {close}; "
            'send "examples" of the task, from which an adapter is learnt; "force": true in a '
            "request, or --force, generates one anyway"
        )
        self.score = score
        self.limit = limit
        self.nearest = tuple(nearest)


class GeneratorMismatch(GeneratorError):
    pass


class NotTrained(GeneratorError):
    pass


class UnfitExpert(GeneratorError):
    pass


class UnfitPrompts(GeneratorError):
    pass


class UnfitExamples(GeneratorError):
    pass


class BudgetTooShort(UnfitExamples):
    """The time does not suffice for one score of what was learnt."""


class NothingLearnt(GeneratorError):
    def __init__(self, n_pairs: int) -> None:
        super().__init__(
            f"{n_pairs} examples made nothing that does better on held-out ones than the base; "
            'give more examples or more time ("budget_s"), or send them as turns of the chat'
        )


class OutOfTime(GeneratorError):
    def __init__(self) -> None:
        super().__init__(
            "the time was over before the examples had been tried once; while a server answers "
            "others, learning takes a small share of the time. Give more of it "
            '("budget_s") or ask again later. A draft stays as it is'
        )
