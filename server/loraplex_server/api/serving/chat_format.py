"""Chat answers as JSON: the body, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from loraplex_server.api.streaming.token_text import TokenTexts

from .choice import ChoiceDelta, CollectedChoice
from .generation import Usage
from .logprobs import chat_logprobs
from .message_parser import MessageParser, MessagePiece, ParsedMessage, ParserSpec

__all__ = ["AnswerHead", "ChatFormat"]

_NOTHING_BESIDE = (b"null", b"")


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every chunk of one answer repeats, and the options that shape it."""

    id: str
    created: int  # seconds since the epoch
    model: str
    adapter: Mapping[str, object] | None = None  # name, digest, how it was chosen
    routing: Mapping[str, object] | None = None  # of ``auto``: candidates and scores
    with_logprobs: bool = False
    with_token_ids: bool = False
    prompt_ids: Sequence[Sequence[int]] = ()  # of each prompt, for ``with_token_ids``
    include_usage: bool = False
    usage_in_every_chunk: bool = False

    def extras(self) -> dict[str, object]:
        """Our own fields of an answer; ``adapter`` is always there."""
        if self.routing is None:
            return {"adapter": self.adapter}
        return {"adapter": self.adapter, "loraplex": {"routing": self.routing}}

    def first_extras(self) -> bytes:
        """``,"adapter":…`` for the first chunk of a stream; nothing for a plain base answer."""
        if self.adapter is None and self.routing is None:
            return b""
        return b"," + orjson.dumps(self.extras())[1:-1]

    def opening(self, kind: str) -> bytes:
        """``data: {"id":…,"model":…`` without the closing brace."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return b"data: " + orjson.dumps(head)[:-1]

    def closing(self, usage: Usage) -> bytes:
        """The end of a chunk, with what ``stream_options`` asked of its ``usage``."""
        if self.usage_in_every_chunk:
            return b',"usage":' + orjson.dumps(usage.to_json()) + b"}\n\n"
        return b',"usage":null}\n\n' if self.include_usage else b"}\n\n"


class ChatFormat:
    """Chunks are joined from constant parts; only the text is encoded for each token."""

    def __init__(
        self, head: AnswerHead, texts: TokenTexts, parser: ParserSpec | None = None
    ) -> None:
        """``parser`` finds tool calls and reasoning; without one the text is the content."""
        self._head = head
        self._texts = texts
        self._parser = parser
        self._parsers: dict[int, MessageParser] = {}  # of a stream's choices
        self._opening = head.opening("chat.completion.chunk")
        self._started: set[int] = set()
        self._plain = not (head.with_logprobs or head.with_token_ids)

    def chunks(self, delta: ChoiceDelta, usage: Usage) -> bytes:
        """The events for one delta: the role first, the finish reason in a chunk of its own."""
        end = self._head.closing(usage)
        opening = b'%s,"choices":[{"index":%d,' % (self._opening, delta.index)
        out = b""
        if delta.index not in self._started:
            out += self._role(delta.index, opening, end)
        if self._parser is not None:
            out += self._pieces(delta, self._parser, opening, end)
        elif delta.text or self._has_more(delta):
            content = b'{"content":%s}' % orjson.dumps(delta.text)
            out += self._chunk(content, opening, end, self._beside(delta))
        if delta.finish_reason is not None:
            reason = delta.finish_reason
            if reason == "stop" and self._parser and self._parsers[delta.index].n_calls:
                reason = "tool_calls"
            final = {"finish_reason": reason, "stop_reason": delta.stop_reason}
            out += b'%s"delta":{},"logprobs":null,%s]%s' % (opening, orjson.dumps(final)[1:], end)
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'%s,"choices":[],"usage":%s}\n\n' % (self._opening, orjson.dumps(usage.to_json()))

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes:
        head = self._head
        shown: dict[str, object] = {
            "id": head.id,
            "object": "chat.completion",
            "created": head.created,
            "model": head.model,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage.to_json(),
            **head.extras(),
        }
        if prompt := choices[0].prompt_logprobs_json:  # all have the same prompt
            shown["prompt_logprobs"] = orjson.Fragment(prompt)
        if head.with_token_ids:
            shown["prompt_token_ids"] = head.prompt_ids[0]
        return orjson.dumps(shown)

    def _role(self, index: int, opening: bytes, end: bytes) -> bytes:
        if not self._started:
            end = self._head.first_extras() + end
            if self._head.with_token_ids:
                end = b',"prompt_token_ids":' + orjson.dumps(self._head.prompt_ids[0]) + end
        self._started.add(index)
        return (
            b'%s"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%s'
            % (opening, end)
        )

    def _pieces(self, delta: ChoiceDelta, spec: ParserSpec, opening: bytes, end: bytes) -> bytes:
        """Log-probabilities and ids stand beside the first piece, or in a chunk without one."""
        parser = self._parsers.get(delta.index)
        if parser is None:
            parser = self._parsers[delta.index] = MessageParser(spec)
        pieces = parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        shown = [orjson.dumps(_piece_delta(piece)) for piece in pieces]
        if not shown and self._has_more(delta):
            shown = [b"{}"]
        beside = self._beside(delta)
        out = b""
        for content in shown:
            out += self._chunk(content, opening, end, beside)
            beside = _NOTHING_BESIDE
        return out

    def _has_more(self, delta: ChoiceDelta) -> bool:
        """Something to show beside the text."""
        return bool(delta.entries or (delta.token_ids and self._head.with_token_ids))

    def _beside(self, delta: ChoiceDelta) -> tuple[bytes, bytes]:
        """Log-probabilities; token ids."""
        if self._plain:
            return _NOTHING_BESIDE
        logprobs, ids = _NOTHING_BESIDE
        if self._head.with_logprobs:
            logprobs = orjson.dumps(chat_logprobs(delta.entries, self._texts))
        if self._head.with_token_ids:
            ids = b',"token_ids":' + orjson.dumps(delta.token_ids)
        return logprobs, ids

    def _chunk(
        self, content: bytes, opening: bytes, end: bytes, beside: tuple[bytes, bytes]
    ) -> bytes:
        return b'%s"delta":%s,"logprobs":%s,"finish_reason":null%s}]%s' % (
            opening,
            content,
            *beside,
            end,
        )

    def _choice(self, choice: CollectedChoice) -> dict[str, object]:
        message: dict[str, object] = {
            "role": "assistant",
            "content": choice.text,
            "refusal": None,
        }
        reason = choice.finish_reason
        if self._parser is not None:
            parsed = ParsedMessage.of(choice.text, self._parser)
            message |= _parsed_fields(parsed)
            if parsed.calls and reason == "stop":
                reason = "tool_calls"
        shown: dict[str, object] = {
            "index": choice.index,
            "message": message,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": choice.stop_reason,
        }
        if self._head.with_logprobs:
            shown["logprobs"] = chat_logprobs(choice.entries, self._texts)
        if self._head.with_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown


def _parsed_fields(parsed: ParsedMessage) -> dict[str, object]:
    """Of the message; ``content`` is null where there is nothing but calls."""
    fields: dict[str, object] = {
        "content": parsed.content if parsed.content or not parsed.calls else None
    }
    if parsed.reasoning:
        fields["reasoning_content"] = parsed.reasoning
    if parsed.calls:
        fields["tool_calls"] = [call.to_json() for call in parsed.calls]
    return fields


def _piece_delta(piece: MessagePiece) -> dict[str, object]:
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.name is None:
        call: dict[str, object] = {"index": piece.number, "function": {"arguments": piece.text}}
    else:
        function = {"name": piece.name, "arguments": piece.text}
        call = {"index": piece.number, "id": piece.id, "type": "function", "function": function}
    return {"tool_calls": [call]}
