"""Where one request stands in its grammar."""

from __future__ import annotations

from collections import deque

from llguidance import LLMatcher

from .grammar import CompiledGrammar

__all__ = ["Constraint"]


class Constraint:
    """Moves with the request's tokens. Engine thread; ``matcher`` is read beside it (TokenMasks).

    tokens of the answer: [known to the request | forced, still to come]
    ``matcher`` stands at the end of both.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.matcher: LLMatcher = grammar.matcher.deep_copy()
        self._forced: deque[int] = deque()
        self._look_ahead()

    @property
    def forced(self) -> int | None:
        """The next token where the grammar leaves no choice; None where it has to be sampled."""
        return self._forced[0] if self._forced else None

    @property
    def ended(self) -> bool:
        """Nothing can follow but an end token."""
        return not self._forced and self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """What stopped it before its end: a step that is too complex, or that allows no token."""
        if not self.matcher.is_error():
            return None
        return str(self.matcher.get_error()).strip().partition("\n")[0]

    def accept(self, token_id: int) -> None:
        """The answer got this token, sampled under the mask or forced."""
        if self._forced:
            assert token_id == self._forced[0]
            self._forced.popleft()
        else:
            self.matcher.consume_token(token_id)
        self._look_ahead()

    def take_forced(self, n_most: int, stop_token_ids: frozenset[int]) -> list[int]:
        """Up to ``n_most`` tokens that need not be sampled; none at or behind a stop token."""
        taken: list[int] = []
        while self._forced and len(taken) < n_most and self._forced[0] not in stop_token_ids:
            taken.append(self._forced.popleft())
        return taken

    def _look_ahead(self) -> None:
        if self._forced or self.matcher.is_stopped():
            return
        forced = self.matcher.compute_ff_tokens()
        if forced and self.matcher.consume_tokens(forced):
            self._forced.extend(forced)
