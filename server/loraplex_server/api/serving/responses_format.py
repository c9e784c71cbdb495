"""Answers of /v1/responses as JSON: the object, and the typed events of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from loraplex_server.api.errors import ApiError
from loraplex_server.api.streaming.sse import sse_event
from loraplex_server.api.streaming.token_text import TokenTexts

from .answer_pieces import AnswerPieces, as_one_delta
from .chat_format import AnswerHead
from .choice import ChoiceDelta, CollectedChoice
from .generation import Usage
from .logprobs import chat_logprobs
from .message_parser import MessagePiece, ParserSpec

__all__ = ["ResponsesFormat", "stream_error"]

Item = dict[str, Any]  # of the output, as JSON
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_KINDS = {"content": "message", "reasoning": "reasoning", "call": "function_call"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponsesFormat:
    """Writes one answer: items open and close as the pieces come."""

    def __init__(
        self,
        head: AnswerHead,
        texts: TokenTexts,
        parser: ParserSpec | None,
        echo: Mapping[str, object],
        keep: Callable[[bytes, Sequence[Item]], None],
    ) -> None:
        """``echo``: what the object repeats of the request. ``keep`` gets the whole answer."""
        self.n_events = 0
        self._head = head
        self._texts = texts
        self._pieces = AnswerPieces(parser)
        self._echo = echo
        self._keep = keep
        self._output: list[Item] = []
        self._is_open = False  # the last item
        self._call = -1  # number of the call that came last
        self._logprobs: list[object] = []  # not yet beside a text

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes:
        out = b""
        if not self.n_events:
            started = self._response("in_progress", None, None)
            out = self._event("response.created", response=started)
            out += self._event("response.in_progress", response=started)
        out += self._add(delta)
        if delta.finish_reason is not None:
            kind, response = self._end(delta.finish_reason, usage)
            self._keep(orjson.dumps(response), self._output)
            out += self._event(kind, response=response)
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # the last event has it

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes:
        (choice,) = choices
        delta = as_one_delta(choice)
        assert delta.finish_reason is not None
        self._add(delta)
        _, response = self._end(delta.finish_reason, usage)
        body = orjson.dumps(response)
        self._keep(body, self._output)
        return body

    def _end(self, finish_reason: str, usage: Usage) -> tuple[str, Item]:
        if finish_reason == "length":
            reason = {"reason": "max_output_tokens"}
            return "response.incomplete", self._response("incomplete", reason, usage)
        return "response.completed", self._response("completed", None, usage)

    def _add(self, delta: ChoiceDelta) -> bytes:
        if self._head.with_logprobs and delta.entries:
            content = chat_logprobs(delta.entries, self._texts)["content"]
            assert isinstance(content, list)
            self._logprobs += content
        out = b""
        for piece in self._pieces.of(delta):
            if not self._continues(piece):
                out += self._close("completed") + self._open(piece)
            out += self._grow(piece)
        if delta.finish_reason is not None:
            if self._logprobs and self._is_open and self._output[-1]["type"] == "message":
                # of tokens without text, such as the end token
                out += self._grow(MessagePiece("content", ""))
            out += self._close("incomplete" if delta.finish_reason == "length" else "completed")
        return out

    def _continues(self, piece: MessagePiece) -> bool:
        if not self._is_open or self._output[-1]["type"] != _KINDS[piece.kind]:
            return False
        return piece.kind != "call" or piece.number == self._call

    def _open(self, piece: MessagePiece) -> bytes:
        kind = _KINDS[piece.kind]
        item: Item = {"id": _PREFIXES[kind] + uuid.uuid4().hex, "type": kind}
        item["status"] = "in_progress"
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            self._call = piece.number
            item |= {"call_id": piece.id, "name": piece.name, "arguments": ""}
        self._output.append(item)
        self._is_open = True
        out = self._event("response.output_item.added", output_index=self._at, item=item)
        if kind in _PARTS:
            part = _part(kind)
            out += self._of_item("response.content_part.added", content_index=0, part=part)
            item["content"].append(part)
        return out

    def _grow(self, piece: MessagePiece) -> bytes:
        item = self._output[-1]
        if piece.kind == "call":
            item["arguments"] += piece.text
            if not piece.text:
                return b""
            return self._of_item("response.function_call_arguments.delta", delta=piece.text)
        part = item["content"][0]
        part["text"] += piece.text
        if piece.kind == "reasoning":
            return self._of_item("response.reasoning_text.delta", content_index=0, delta=piece.text)
        logprobs, self._logprobs = self._logprobs, []
        part["logprobs"] += logprobs
        return self._of_item(
            "response.output_text.delta", content_index=0, delta=piece.text, logprobs=logprobs
        )

    def _close(self, status: str) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            out = self._of_item(
                "response.function_call_arguments.done",
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            text = {key: part[key] for key in ("text", "logprobs") if key in part}
            kind = _PARTS[item["type"]]
            out = self._of_item(f"response.{kind}.done", content_index=0, **text)
            out += self._of_item("response.content_part.done", content_index=0, part=part)
        return out + self._event("response.output_item.done", output_index=self._at, item=item)

    @property
    def _at(self) -> int:
        return len(self._output) - 1

    def _of_item(self, kind: str, **fields: object) -> bytes:
        item = self._output[-1]
        return self._event(kind, item_id=item["id"], output_index=self._at, **fields)

    def _event(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self.n_events, **fields}
        self.n_events += 1
        return sse_event(kind, orjson.dumps(data))

    def _response(
        self, status: str, incomplete: Mapping[str, str] | None, usage: Usage | None
    ) -> Item:
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "model": self._head.model,
            "output": self._output,
            "usage": None if usage is None else _usage(usage),
            "incomplete_details": incomplete,
            "error": None,
            **self._echo,
            **self._head.extras(),
        }


def stream_error(error: ApiError, sequence_number: int) -> bytes:
    data = {"type": "error", "sequence_number": sequence_number, "message": error.message}
    return sse_event("error", orjson.dumps({**data, "code": error.code, "param": error.param}))


def _part(kind: str) -> Item:
    part: Item = {"type": _PARTS[kind], "text": ""}
    if kind == "message":
        part |= {"annotations": [], "logprobs": []}
    return part


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.n_prompt,
        "input_tokens_details": {"cached_tokens": usage.n_cached, "cache_write_tokens": 0},
        "output_tokens": usage.n_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.n_prompt + usage.n_output,
    }
