"""Writes answers of /v1/responses: the object, and the typed events of a stream."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from loraplex_server.api.serving.chat.message_parser import (
    AnswerPieces,
    MessagePiece,
    ParserSpec,
)
from loraplex_server.api.serving.text_generation.answer_head import AnswerHead
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput
from loraplex_server.api.serving.text_generation.generation import Usage
from loraplex_server.api.serving.text_generation.logprobs import chat_logprobs
from loraplex_server.api.streaming.sse import sse_event
from loraplex_server.errors import ApiError
from loraplex_server.text.token_text import TokenTexts

Item = dict[str, Any]  # an item of the output, JSON-ready
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_KINDS = {"content": "message", "reasoning": "reasoning", "call": "function_call"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class EventWriter:
    """Numbers the events of one stream."""

    def __init__(self, n_events: int = 0) -> None:
        self.n_events = n_events

    def event(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self.n_events, **fields}
        self.n_events += 1
        return sse_event(kind, orjson.dumps(data))

    def error(self, error: ApiError) -> bytes:
        return self.event("error", message=error.message, code=error.code, param=error.param)


class ResponsesFormat:
    """Writes one answer. Items open and close as the pieces arrive."""

    def __init__(
        self,
        head: AnswerHead,
        texts: TokenTexts,
        parser: ParserSpec | None,
        events: EventWriter,
        request_fields: Mapping[str, object],
        store: Callable[[str, bytes, Sequence[Item]], None],
    ) -> None:
        """``request_fields``: repeated by the answer. ``store`` gets the id, answer and output."""
        self._events = events
        self._event = events.event
        self._head = head
        self._texts = texts
        self._pieces = AnswerPieces(parser)
        self._request_fields = request_fields
        self._store = store
        self._output: list[Item] = []
        self._is_open = False  # the last item is not closed yet
        self._call = -1  # number of the last call
        self._logprobs: list[object] = []  # not in an event yet

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes:
        out = b""
        if not self._events.n_events:
            started = self._response("in_progress", None, None)
            out = self._event("response.created", response=started)
            out += self._event("response.in_progress", response=started)
        out += self._add(output)
        if output.finish_reason is not None:
            kind, response = self._end(output.finish_reason, usage)
            self._store(self._head.id, orjson.dumps(response), self._output)
            out += self._event(kind, response=response)
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # the last event has the usage

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes:
        (choice,) = choices
        assert choice.finish_reason is not None
        self._add(choice)
        _, response = self._end(choice.finish_reason, usage)
        body = orjson.dumps(response)
        self._store(self._head.id, body, self._output)
        return body

    def _end(self, finish_reason: str, usage: Usage) -> tuple[str, Item]:
        if finish_reason == "length":
            reason = {"reason": "max_output_tokens"}
            return "response.incomplete", self._response("incomplete", reason, usage)
        return "response.completed", self._response("completed", None, usage)

    def _add(self, output: ChoiceOutput) -> bytes:
        if self._head.with_logprobs and output.entries:
            content = chat_logprobs(output.entries, self._texts)["content"]
            assert isinstance(content, list)
            self._logprobs += content
        out = b""
        for piece in self._pieces.of(output):
            if not self._continues(piece):
                out += self._close("completed") + self._open(piece)
            out += self._grow(piece)
        if output.finish_reason is not None:
            if self._logprobs and self._is_open and self._output[-1]["type"] == "message":
                # of tokens without text, as the end token
                out += self._grow(MessagePiece("content", ""))
            out += self._close("incomplete" if output.finish_reason == "length" else "completed")
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
            **self._request_fields,
            **self._head.extras(),
        }


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
