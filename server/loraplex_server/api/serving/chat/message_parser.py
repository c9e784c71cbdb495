"""Splits an answer's text into content, reasoning and tool calls while the text arrives.

transformers' response parser finds the regions, or ``TaggedRegions`` where a grammar enforces them.
``ToolCallReader`` reads calls in the usual markup as they arrive. The calls of a response template
are read when their region is whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import JsonValue
from transformers.utils.chat_parsing import ResponseParser

from loraplex_server.api.serving.text_generation.choice import ChoiceOutput

from .structural_tags import StructuralTags, TaggedRegions
from .tool_call_reader import ToolCallReader
from .tool_markup import ChatMarkup

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class ParserSpec:
    """The markup of one call's answers. ``prefix``: the part of the answer in the prompt."""

    template: Mapping[str, JsonValue]
    prefix: str
    reads_json: bool  # calls are text to the template, and JSON for the ToolCallReader
    one_call: bool
    markers: tuple[str, str] = ("", "")  # of calls, to show text that is no call
    tags: StructuralTags | None = None  # enforced by a grammar; used in place of the template

    @classmethod
    def of(
        cls,
        markup: ChatMarkup,
        *,
        with_calls: bool,
        one_call: bool,
        prompt: str,
        tags: StructuralTags | None = None,
    ) -> ParserSpec:
        """Return the spec. ``prompt`` is the prompt's end, or all of it for a response template."""
        if markup.response_template is not None:
            return cls(markup.response_template, prompt, reads_json=False, one_call=one_call)
        fields: dict[str, JsonValue] = {"content": _verbatim()}
        prefix = ""
        if with_calls:
            fields["tool_calls"] = _verbatim(markup.calls.open, markup.calls.close)
        if markup.reasoning is not None:
            fields["reasoning_content"] = _verbatim(*markup.reasoning)
            if prompt.rstrip().endswith(markup.reasoning.open):
                prefix = markup.reasoning.open
        template: dict[str, JsonValue] = {"start_anchor": "\0", "fields": fields}
        markers = (markup.calls.open, markup.calls.close)
        return cls(template, prefix, reads_json=True, one_call=one_call, markers=markers, tags=tags)


class MessagePiece(NamedTuple):
    """A piece of an answer. Only the first piece of a call has ``name`` and ``id``."""

    kind: Literal["content", "reasoning", "call"]
    text: str  # of a call: its arguments
    number: int = 0  # of the call
    name: str | None = None
    id: str | None = None


class MessageParser:
    """Parses one choice. ``feed`` text in order, then ``finish`` once."""

    def __init__(self, spec: ParserSpec) -> None:
        self.n_calls = 0
        self._spec = spec
        self._parser: ResponseParser | TaggedRegions | None
        if spec.tags is None:
            self._parser = ResponseParser(dict(spec.template), prefix=spec.prefix)
        else:
            self._parser = TaggedRegions(spec.tags)
        self._reader = ToolCallReader()
        self._region = ""  # raw text of the open region of calls
        self._region_calls = 0  # pieces of calls in the region
        self._kind = ""  # of the last text
        self._space = ""  # held back; dropped before a call or the end of reasoning
        self._is_bare = False  # drop leading white space, after reasoning or a call

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
            if not all(calls):  # some are no calls
                yield from self._text("content", self._region)
            for call in calls if all(calls) else ():
                assert call is not None
                yield from self._call(*call)
        elif self._reader.broken:
            yield from self._text("content", close)
        elif not self._region_calls and self._region.strip(" \n[]"):
            # The region ended before a name.
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
        """Treat all further text as content."""
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
    """A whole message of the assistant."""

    content: str
    reasoning: str
    calls: list[CalledTool]

    @classmethod
    def joined(cls, pieces: Sequence[MessagePiece]) -> ParsedMessage:
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

    def to_json(self) -> dict[str, object]:
        """Return the message as JSON. ``content`` is null if it has only calls."""
        content = self.content if self.content or not self.calls else None
        shown: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            shown["reasoning_content"] = self.reasoning
        if self.calls:
            shown["tool_calls"] = [call.to_json() for call in self.calls]
        return shown


class AnswerPieces:
    """The pieces of one choice."""

    def __init__(self, spec: ParserSpec | None) -> None:
        """``spec``: None if the answer is all content."""
        self._parser = None if spec is None else MessageParser(spec)

    @property
    def n_calls(self) -> int:
        return 0 if self._parser is None else self._parser.n_calls

    def of(self, output: ChoiceOutput) -> list[MessagePiece]:
        if self._parser is None:
            return [MessagePiece("content", output.text)] if output.text else []
        pieces = self._parser.feed(output.text)
        return pieces if output.finish_reason is None else [*pieces, *self._parser.finish()]


def _named(called: object) -> tuple[str, str] | None:
    """Return name and arguments of a response template's value; None if it is no call."""
    function = called.get("function", called) if isinstance(called, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", {})
    return function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)


def _verbatim(open_: str | None = None, close: str | None = None) -> dict[str, JsonValue]:
    """Describe a region whose text is kept unchanged."""
    field: dict[str, JsonValue] = {"content": "text", "content_args": {"strip": False}}
    if open_ is None:
        return field
    return {**field, "open": open_, "close": close, "repeats": True}
