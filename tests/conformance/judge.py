"""Holds an answer of the server against the log-probabilities of its oracle.

An answer is right if every token is the oracle's most likely one, and the log-probabilities of the
tokens, of the best alternatives and of the prompt differ by at most 1e-4. Some adapters amplify
the rounding of float32 further than that; then twice the oracle's own movement between two orders
of computing is allowed, and never more than 1e-3: a wrong part of an adapter is off by 1e-2 and
more.
"""

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tests.conformance.load import Answer, Question
from tests.conformance.oracle import logprobs_along

_TOLERANCE = 1e-4
_LIMIT = 1e-3
_MATTERS = 0.02


def difference(question: Question, answer: Answer, expected: Tensor) -> float:
    """The largest difference in log-probability; ``expected`` [prompt + answer − 1, vocab_size].

    A token that is not the most likely one differs by as much as the best is better.
    """
    n_prompt = len(question.prompt)
    found: list[float] = []
    if question.echo:
        echoed = zip(answer.prompt_logprobs, expected, question.prompt[1:], strict=False)
        found += [abs(given - float(row[token])) for given, row, token in echoed]
    rows = expected[n_prompt - 1 :]
    for row, token, logprob, top in zip(
        rows, answer.token_ids, answer.logprobs, answer.top, strict=True
    ):
        best = row.topk(len(top)).values
        found.append(float(best[0] - row[token]))
        found.append(abs(logprob - float(row[token])))
        found.append(float((torch.tensor(top, dtype=best.dtype) - best).abs().max()))
    return max(found)


def explain(
    model: nn.Module,
    base: nn.Module | None,
    questions: Sequence[Question],
    answers: Sequence[Answer],
) -> str | None:
    """Return None if all answers of one adapter are right, else the problem.

    ``base``: the model without the adapter, which must answer differently.
    """
    for answer in answers:
        if answer.status != 200:
            return f"status {answer.status}: {answer.error}"
    prompts = [question.prompt for question in questions]
    tokens = [answer.token_ids for answer in answers]
    expected = logprobs_along(model, prompts, tokens)
    if base is not None:
        matters = _at_the_first_token(base, questions, answers)
        if matters < _MATTERS:
            plain = logprobs_along(base, prompts, tokens)
            matters = max(map(difference, questions, answers, plain))
        if matters < _MATTERS:
            return f"the adapter changes the answer by {matters:.1e} only: the row proves nothing"
    off = max(
        difference(question, answer, rows)
        for question, answer, rows in zip(questions, answers, expected, strict=True)
    )
    if off <= _TOLERANCE:
        return None
    moved = _movement(model, questions, answers, expected)
    if off <= bound_of(moved):
        return None
    return f"off by {off:.2e} in log-probability; rounding explains {moved:.1e}"


def _at_the_first_token(
    base: nn.Module, questions: Sequence[Question], answers: Sequence[Answer]
) -> float:
    """The difference to the base up to there, where it is the same for all adapters."""
    plain = _along_prompts(base, tuple(question.prompt for question in questions))
    first = [
        replace(
            answer,
            token_ids=answer.token_ids[:1],
            logprobs=answer.logprobs[:1],
            top=answer.top[:1],
        )
        for answer in answers
    ]
    return max(map(difference, questions, first, plain))


def _along_prompts(base: nn.Module, prompts: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    known = _known.setdefault(base, {})
    if prompts not in known:
        known[prompts] = logprobs_along(base, prompts, [[0]] * len(prompts))
    return known[prompts]


_known: WeakKeyDictionary[nn.Module, dict[object, list[Tensor]]] = WeakKeyDictionary()


def bound_of(moved: float) -> float:
    """Return the allowed difference of an answer, where the oracle itself moves by ``moved``."""
    return min(max(_TOLERANCE, 2 * moved), _LIMIT)


def _movement(
    model: nn.Module,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    together: Sequence[Tensor],
) -> float:
    """Return how far the oracle's log-probabilities move between prompts alone and together."""
    moved = 0.0
    for question, answer, rows in zip(questions, answers, together, strict=True):
        (alone,) = logprobs_along(model, [question.prompt], [answer.token_ids])
        likely = rows.topk(20).indices
        moved = max(moved, float((alone - rows).gather(1, likely).abs().max()))
        chosen = torch.tensor([*question.prompt[1:], *answer.token_ids])[:, None]
        moved = max(moved, float((alone - rows).gather(1, chosen).abs().max()))
    return moved
