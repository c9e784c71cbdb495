"""One streamed choice as pieces of content, reasoning and calls, for the other APIs."""

from __future__ import annotations

from .choice import ChoiceDelta, CollectedChoice
from .message_parser import MessageParser, MessagePiece, ParserSpec

__all__ = ["AnswerPieces", "as_one_delta"]


class AnswerPieces:
    def __init__(self, spec: ParserSpec | None) -> None:
        """None: an answer is all content."""
        self._parser = None if spec is None else MessageParser(spec)

    def of(self, delta: ChoiceDelta) -> list[MessagePiece]:
        if self._parser is None:
            return [MessagePiece("content", delta.text)] if delta.text else []
        pieces = self._parser.feed(delta.text)
        return pieces if delta.finish_reason is None else [*pieces, *self._parser.finish()]


def as_one_delta(choice: CollectedChoice) -> ChoiceDelta:
    return ChoiceDelta(
        choice.index,
        choice.text,
        tuple(choice.token_ids),
        choice.entries,
        choice.finish_reason,
        choice.stop_reason,
        choice.prompt_logprobs,
    )
