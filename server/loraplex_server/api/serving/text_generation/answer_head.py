"""The part of an answer that all of its choices share, and how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from .generation import Usage


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The fields that every chunk of one answer repeats, and the options that shape it."""

    id: str
    created: int  # seconds since the epoch
    model: str
    adapter: Mapping[str, object] | None = None  # name, digest, how the adapter was chosen
    routing: Mapping[str, object] | None = None  # candidates and scores of ``auto``
    with_logprobs: bool = False
    with_token_ids: bool = False
    prompt_ids: Sequence[Sequence[int]] = ()  # of each prompt, for ``with_token_ids``
    include_usage: bool = False
    usage_in_every_chunk: bool = False

    def extras(self) -> dict[str, object]:
        """Return the fields that only this server adds. ``adapter`` is always present."""
        if self.routing is None:
            return {"adapter": self.adapter}
        return {"adapter": self.adapter, "loraplex": {"routing": self.routing}}

    def first_extras(self) -> bytes:
        """Return ``,"adapter":…`` for a stream's first chunk; nothing for a plain base answer."""
        if self.adapter is None and self.routing is None:
            return b""
        return b"," + orjson.dumps(self.extras())[1:-1]

    def opening(self, kind: str) -> bytes:
        """Return ``data: {"id":…,"model":…`` without the closing brace."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return b"data: " + orjson.dumps(head)[:-1]

    def closing(self, usage: Usage) -> bytes:
        """Return the end of a chunk, with ``usage`` as ``stream_options`` asks for it."""
        if self.usage_in_every_chunk:
            return b',"usage":' + orjson.dumps(usage.to_json()) + b"}\n\n"
        return b',"usage":null}\n\n' if self.include_usage else b"}\n\n"

    def usage_chunk(self, kind: str, usage: Usage) -> bytes:
        """Return the last chunk of a stream that includes its usage."""
        usage_json = orjson.dumps(usage.to_json())
        return b'%s,"choices":[],"usage":%s}\n\n' % (self.opening(kind), usage_json)

    def body(self, kind: str, choices: Sequence[object], usage: Usage) -> dict[str, object]:
        """Return the whole answer, JSON-ready."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage.to_json(),
            **self.extras(),
        }
