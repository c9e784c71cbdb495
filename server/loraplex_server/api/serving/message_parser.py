"""An answer's text becomes content, reasoning and tool calls, while it comes.

transformers' response parser finds the regions, or ``HeldRegions`` where a grammar holds them. What
the calls of the usual forms say is read while they come (``ToolCallReader``); those of a response
template when each region is whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import JsonValue
from transformers.utils.chat_parsing import ResponseParser

from .chat_protocol import ChatProtocol
from .held_regions import HeldForm, HeldRegions
from .tool_call_reader import ToolCallReader

__all__ = [
    "REASONING_FIELDS",
    "CalledTool",
    "MessageParser",
    "MessagePiece",
    "ParsedMessage",
    "ParserSpec",
]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class ParserSpec:
    """What one call's answers look like; ``prefix``: what the prompt wrote of the answer."""

    template: Mapping[str, JsonValue]
    prefix: str
    reads_json: bool  # calls are text to the template, and read here
    one_call: bool
    markers: tuple[str, str] = ("", "")  # of calls, for text that turns out to be none
    held: HeldForm | None = None  # what a grammar makes of it; then the template is not asked

    @classmethod
    def of(
        cls,
        protocol: ChatProtocol,
        *,
        with_calls: bool,
        one_call: bool,
        prompt: str,
        held: HeldForm | None = None,
    ) -> ParserSpec:
        """``prompt``: its text, of which the end matters."""
        if protocol.response_template is not None:
            return cls(protocol.response_template, prompt, reads_json=False, one_call=one_call)
        fields: dict[str, JsonValue] = {"content": _verbatim()}
        prefix = ""
        if with_calls:
            fields["tool_calls"] = _verbatim(protocol.calls.open, protocol.calls.close)
        if protocol.reasoning is not None:
            fields["reasoning_content"] = _verbatim(*protocol.reasoning)
            if prompt.rstrip().endswith(protocol.reasoning.open):
                prefix = protocol.reasoning.open
        template: dict[str, JsonValue] = {"start_anchor": "\0", "fields": fields}
        markers = (protocol.calls.open, protocol.calls.close)
        return cls(template, prefix, reads_json=True, one_call=one_call, markers=markers, held=held)


class MessagePiece(NamedTuple):
    """Of a call: ``name`` and ``id`` come once, with the first piece of its ``number``."""

    kind: Literal["content", "reasoning", "call"]
    text: str  # of a call: of its arguments
    number: int = 0  # of the call
    name: str | None = None
    id: str | None = None


class MessageParser:
    """One choice. ``feed`` text in order, then ``finish`` once."""

    def __init__(self, spec: ParserSpec) -> None:
        self.n_calls = 0
        self._spec = spec
        self._parser: ResponseParser | HeldRegions | None
        if spec.held is None:
            self._parser = ResponseParser(dict(spec.template), prefix=spec.prefix)
        else:
            self._parser = HeldRegions(spec.held)
        self._reader = ToolCallReader()
        self._region = ""  # raw text of the open region of calls
        self._region_calls = 0  # pieces that it gave
        self._kind = ""  # of the text that came last
        self._space = ""  # held back: dropped where a call or the end of reasoning follows
        self._is_bare = False  # text behind reasoning or a call begins without white space

    def feed(self, text: str) -> list[MessagePiece]:
        if self._parser is None:
            return list(self._text("content", text))
        try:
            events = self._parser.feed(text)
        except Exception:  # the answer does not fit the template
            return self._give_up(text)
        return [piece for event in events for piece in self._read(event, at_end=False)]

    def finish(self) -> list[MessagePiece]:
        pieces: list[MessagePiece] = []
        if self._parser is not None:
            try:
                _, events = self._parser.finalize()
            except Exception:
                pieces += self._give_up("")
            else:
                pieces += [p for event in events for p in self._read(event, at_end=True)]
        if self._space and self._kind == "content" and not self.n_calls:
            pieces.append(MessagePiece("content", self._space))
        return pieces

    def _read(self, event: Mapping[str, object], *, at_end: bool) -> Iterator[MessagePiece]:
        kind, field = event["type"], str(event["field"])
        if field == "tool_calls":
            if kind == "region_open":
                self._reader, self._region, self._region_calls = ToolCallReader(), "", 0
            elif kind == "region_chunk":
                yield from self._call_text(str(event["text"]))
            else:
                yield from self._calls_end(event["value"], "" if at_end else self._spec.markers[1])
        elif kind == "region_chunk":
            name: Literal["content", "reasoning"] = (
                "reasoning" if field in REASONING_FIELDS else "content"
            )
            yield from self._text(name, str(event["text"]))

    def _call_text(self, text: str) -> Iterator[MessagePiece]:
        if not self._spec.reads_json:
            self._region += text
            return
        if self._reader.broken:
            yield from self._text("content", text)
            return
        self._region += text
        for name, arguments in self._reader.feed(text):
            self._region_calls += 1
            yield from self._call(name, arguments)
        if unread := self._reader.unread:
            whole = self._spec.markers[0] + self._region
            yield from self._text("content", unread if self._region_calls else whole)

    def _calls_end(self, value: object, close: str) -> Iterator[MessagePiece]:
        if not self._spec.reads_json:
            calls = [_named(called) for called in (value if isinstance(value, list) else [value])]
            if not all(calls):  # no call to the letter
                yield from self._text("content", self._region)
            for call in calls if all(calls) else ():
                assert call is not None
                yield from self._call(*call)
        elif self._reader.broken:
            yield from self._text("content", close)
        elif not self._region_calls and self._region.strip(" \n[]"):
            # ended before a name was known
            yield from self._text("content", self._spec.markers[0] + self._region + close)
        self._region = ""

    def _call(self, name: str | None, arguments: str) -> Iterator[MessagePiece]:
        self._space, self._is_bare = "", True
        if name is not None:
            self.n_calls += 1
        number = self.n_calls - 1
        if self._spec.one_call and number > 0:
            return
        call_id = None if name is None else f"call_{uuid.uuid4().hex[:24]}"
        yield MessagePiece("call", arguments, number, name, call_id)

    def _text(self, kind: Literal["content", "reasoning"], text: str) -> Iterator[MessagePiece]:
        if kind != self._kind:
            self._is_bare = self._is_bare or kind == "reasoning" or self._kind == "reasoning"
            self._kind, self._space = kind, ""
        text = self._space + text
        if self._is_bare:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._is_bare = False
            yield MessagePiece(kind, shown)

    def _give_up(self, text: str) -> list[MessagePiece]:
        """From here on everything is content, as it was written."""
        self._parser = None
        return list(self._text("content", self._region + text))


@dataclass(slots=True)
class CalledTool:
    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, object]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ParsedMessage(NamedTuple):
    content: str
    reasoning: str
    calls: list[CalledTool]

    @classmethod
    def of(cls, text: str, spec: ParserSpec) -> ParsedMessage:
        """A whole answer at once."""
        parser = MessageParser(spec)
        pieces = [*parser.feed(text), *parser.finish()]
        calls: list[CalledTool] = []
        for piece in pieces:
            if piece.kind == "call" and piece.name is not None:
                calls.append(CalledTool(str(piece.id), piece.name, ""))
            if piece.kind == "call":
                calls[piece.number].arguments += piece.text
        return cls(
            "".join(piece.text for piece in pieces if piece.kind == "content"),
            "".join(piece.text for piece in pieces if piece.kind == "reasoning"),
            calls,
        )


def _named(called: object) -> tuple[str, str] | None:
    """Name and arguments of what a response template made of a region; None: it is no call."""
    function = called.get("function", called) if isinstance(called, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", {})
    return function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)


def _verbatim(open_: str | None = None, close: str | None = None) -> dict[str, JsonValue]:
    """A region whose text is kept as it is."""
    field: dict[str, JsonValue] = {"content": "text", "content_args": {"strip": False}}
    if open_ is None:
        return field
    return {**field, "open": open_, "close": close, "repeats": True}
