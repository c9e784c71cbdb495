"""Answers of /v1/messages as JSON: the body, and the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from loraplex_server.api.anthropic_errors import anthropic_error
from loraplex_server.api.streaming.sse import SseForm, sse_event

from .answer_pieces import AnswerPieces, as_one_delta
from .chat_format import AnswerHead
from .choice import ChoiceDelta, CollectedChoice
from .generation import Usage
from .message_parser import MessagePiece, ParserSpec

__all__ = ["ANTHROPIC_SSE", "MessagesFormat"]

ANTHROPIC_SSE = SseForm(
    ping=sse_event("ping", b'{"type":"ping"}'),
    end=b"",  # message_stop is the last event
    error=lambda error: sse_event("error", anthropic_error(error)),
)
Block = dict[str, Any]  # of content, as JSON; ``input`` is a text until the block is whole
# kind of a piece → type of its block, of its deltas, and the field that grows
_FORMS = {
    "content": ("text", "text_delta", "text"),
    "reasoning": ("thinking", "thinking_delta", "thinking"),
    "call": ("tool_use", "input_json_delta", "input"),
}


class MessagesFormat:
    """Blocks open and close as the pieces come: an empty answer has none."""

    def __init__(self, head: AnswerHead, parser: ParserSpec | None) -> None:
        self._head = head
        self._pieces = AnswerPieces(parser)
        self._started = False
        self._blocks: list[Block] = []
        self._call = -1  # number of the call that came last

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes:
        out = b"" if self._started else self._start(usage)
        out += self._add(delta)
        if delta.finish_reason is not None:
            if self._blocks:
                out += self._close()
            stop = self._stop(delta.finish_reason, delta.stop_reason)
            out += _event("message_delta", delta=stop, usage=_usage(usage))
            out += _event("message_stop")
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # message_delta has it

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        delta = as_one_delta(choice)
        assert delta.finish_reason is not None
        self._add(delta)
        stop = self._stop(delta.finish_reason, delta.stop_reason)
        for block in self._blocks:
            if block["type"] == "tool_use":
                block["input"] = _object(block["input"])
        return orjson.dumps(self._message(self._blocks, stop, usage))

    def _add(self, delta: ChoiceDelta) -> bytes:
        out = b""
        for piece in self._pieces.of(delta):
            kind, delta_kind, grows = _FORMS[piece.kind]
            if not self._continues(piece, kind):
                if self._blocks:
                    out += self._close()
                out += self._open(piece, kind)
            self._blocks[-1][grows] += piece.text
            if piece.text:
                field = "partial_json" if piece.kind == "call" else grows
                grown = {"type": delta_kind, field: piece.text}
                out += _event("content_block_delta", index=self._at, delta=grown)
        return out

    def _continues(self, piece: MessagePiece, kind: str) -> bool:
        if not self._blocks or self._blocks[-1]["type"] != kind:
            return False
        return piece.kind != "call" or piece.number == self._call

    def _open(self, piece: MessagePiece, kind: str) -> bytes:
        if piece.kind == "call":
            self._call = piece.number
            block: Block = {"type": kind, "id": piece.id, "name": piece.name, "input": ""}
        elif piece.kind == "reasoning":
            block = {"type": kind, "thinking": "", "signature": ""}
        else:
            block = {"type": kind, "text": ""}
        self._blocks.append(block)
        shown = {**block, "input": {}} if piece.kind == "call" else block
        return _event("content_block_start", index=self._at, content_block=shown)

    def _close(self) -> bytes:
        return _event("content_block_stop", index=self._at)

    @property
    def _at(self) -> int:
        return len(self._blocks) - 1

    def _stop(self, finish_reason: str, stop_reason: str | int | None) -> dict[str, object]:
        if finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
        reason = "end_turn" if self._call < 0 else "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}

    def _start(self, usage: Usage) -> bytes:
        self._started = True
        stop = {"stop_reason": None, "stop_sequence": None}
        message = self._message([], stop, usage._replace(n_output=0))
        return _event("message_start", message=message)

    def _message(
        self, content: Sequence[object], stop: Mapping[str, object], usage: Usage
    ) -> dict[str, object]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            **stop,
            "usage": _usage(usage),
            **self._head.extras(),
        }


def _event(kind: str, **fields: object) -> bytes:
    return sse_event(kind, orjson.dumps({"type": kind, **fields}))


def _object(arguments: str) -> dict[str, object]:
    """Arguments that were cut off are none."""
    try:
        found = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.n_cached,
        "output_tokens": usage.n_output,
    }
