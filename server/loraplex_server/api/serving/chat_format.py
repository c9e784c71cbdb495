"""Chat answers as JSON: the body, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from loraplex_server.api.streaming.token_text import TokenTexts

from .choice import ChoiceDelta, CollectedChoice
from .generation import Usage
from .logprobs import chat_logprobs

__all__ = ["AnswerHead", "ChatFormat"]


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

    def __init__(self, head: AnswerHead, texts: TokenTexts) -> None:
        self._head = head
        self._texts = texts
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
        if delta.text or delta.entries or (delta.token_ids and self._head.with_token_ids):
            out += self._content(delta, opening, end)
        if delta.finish_reason is not None:
            final = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            out += b'%s"delta":{},"logprobs":null,%s]%s' % (opening, orjson.dumps(final)[1:], end)
        return out

    def usage_chunk(self, usage: Usage) -> bytes:
        return b'%s,"choices":[],"usage":%s}\n\n' % (self._opening, orjson.dumps(usage.to_json()))

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> bytes:
        head = self._head
        return orjson.dumps(
            {
                "id": head.id,
                "object": "chat.completion",
                "created": head.created,
                "model": head.model,
                "choices": [self._choice(choice) for choice in choices],
                "usage": usage.to_json(),
                **head.extras(),
            }
        )

    def _role(self, index: int, opening: bytes, end: bytes) -> bytes:
        if not self._started:
            end = self._head.first_extras() + end
        self._started.add(index)
        return (
            b'%s"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%s'
            % (opening, end)
        )

    def _content(self, delta: ChoiceDelta, opening: bytes, end: bytes) -> bytes:
        text = orjson.dumps(delta.text)
        if self._plain:
            return b'%s"delta":{"content":%s},"logprobs":null,"finish_reason":null}]%s' % (
                opening,
                text,
                end,
            )
        logprobs, ids = b"null", b""
        if self._head.with_logprobs:
            logprobs = orjson.dumps(chat_logprobs(delta.entries, self._texts))
        if self._head.with_token_ids:
            ids = b',"token_ids":' + orjson.dumps(delta.token_ids)
        return b'%s"delta":{"content":%s},"logprobs":%s,"finish_reason":null%s}]%s' % (
            opening,
            text,
            logprobs,
            ids,
            end,
        )

    def _choice(self, choice: CollectedChoice) -> dict[str, object]:
        shown: dict[str, object] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._head.with_logprobs:
            shown["logprobs"] = chat_logprobs(choice.entries, self._texts)
        if self._head.with_token_ids:
            shown["token_ids"] = choice.token_ids
        return shown
