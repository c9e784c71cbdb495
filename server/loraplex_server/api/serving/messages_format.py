"""Answers of /v1/messages as JSON: the body, and the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from loraplex_server.api.anthropic_errors import anthropic_error
from loraplex_server.api.streaming.sse import SseForm, sse_event

from .chat_format import AnswerHead
from .choice import ChoiceDelta, CollectedChoice
from .generation import Usage

__all__ = ["ANTHROPIC_SSE", "MessagesFormat"]

ANTHROPIC_SSE = SseForm(
    ping=sse_event("ping", b'{"type":"ping"}'),
    end=b"",  # message_stop is the last event
    error=lambda error: sse_event("error", anthropic_error(error)),
)


class MessagesFormat:
    """A text block is opened by its first character: an empty answer has no blocks."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._started = False
        self._in_text = False

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes:
        out = b"" if self._started else self._start(usage)
        if delta.text:
            if not self._in_text:
                self._in_text = True
                block = {"type": "text", "text": ""}
                out += _event("content_block_start", index=0, content_block=block)
            text = {"type": "text_delta", "text": delta.text}
            out += _event("content_block_delta", index=0, delta=text)
        if delta.finish_reason is not None:
            if self._in_text:
                out += _event("content_block_stop", index=0)
            stop = _stop(delta.finish_reason, delta.stop_reason)
            out += _event("message_delta", delta=stop, usage=_usage(usage))
            out += _event("message_stop")
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # message_delta has it

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        assert choice.finish_reason is not None
        content = [{"type": "text", "text": choice.text}] if choice.text else []
        stop = _stop(choice.finish_reason, choice.stop_reason)
        return orjson.dumps(self._message(content, stop, usage))

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


def _stop(finish_reason: str, stop_reason: str | int | None) -> dict[str, object]:
    if finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.n_cached,
        "output_tokens": usage.n_output,
    }
