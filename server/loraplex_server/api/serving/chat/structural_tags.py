"""Finds the tagged regions of an answer that a grammar constrains.

    reasoning? (calls … | text)      if a call or a format of the answer is required
    text (calls text)*               if strict tools may be called; reasoning anywhere

A marker inside a JSON string of a call is text, for the grammar and here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .tool_markup import CallMarkup, ChatMarkup, Markers

Event = Mapping[str, object]  # as of transformers' ResponseParser
_CONTENT, _REASONING, _CALLS = "content", "reasoning_content", "tool_calls"


class StructuralTags(NamedTuple):
    """The markers around the regions of an answer."""

    calls: CallMarkup | None
    reasoning: Markers | None  # None also if the prompt has closed the reasoning
    in_reasoning: bool  # the prompt has opened the reasoning
    is_free: bool  # the answer is text with calls in it, not one or the other

    @classmethod
    def of(
        cls,
        markup: ChatMarkup,
        *,
        with_calls: bool,
        in_reasoning: bool,
        past_reasoning: bool,
        is_free: bool,
    ) -> StructuralTags:
        reasoning = None if past_reasoning and not is_free else markup.reasoning
        return cls(markup.calls if with_calls else None, reasoning, in_reasoning, is_free)


class TaggedRegions:
    """Reads one choice: ``feed`` text in order, then ``finalize`` once, as a ResponseParser."""

    def __init__(self, tags: StructuralTags) -> None:
        self._tags = tags
        self._text = ""  # not in an event yet
        self._region = _REASONING if tags.in_reasoning else ""  # "": between regions
        self._may_think = tags.reasoning is not None and not tags.in_reasoning
        self._may_call = tags.calls is not None
        self._is_open = False  # the region has its event of opening
        self._json = _JsonDepth()

    def feed(self, text: str) -> list[Event]:
        self._text += text
        return list(self._read(at_end=False))

    def finalize(self) -> tuple[None, list[Event]]:
        return None, [*self._read(at_end=True), *self._close()]

    def _read(self, *, at_end: bool) -> Iterator[Event]:
        while True:
            before = (self._region, len(self._text))
            if self._region == _REASONING:
                assert self._tags.reasoning is not None
                yield from self._until(self._tags.reasoning.close, at_end=at_end)
            elif self._region == _CALLS:
                yield from self._follow_json(at_end=at_end)
            else:
                yield from self._find(at_end=at_end)
            if (self._region, len(self._text)) == before:
                return

    def _find(self, *, at_end: bool) -> Iterator[Event]:
        """Read up to the next opening marker."""
        markers = {}
        if self._may_think and self._tags.reasoning is not None:
            markers[self._tags.reasoning.open] = _REASONING
        if self._may_call and self._tags.calls is not None:
            markers[self._tags.calls.open] = _CALLS
        if not self._tags.is_free:
            space = len(self._text) - len(self._text.lstrip("\n "))
            behind = self._text[space:]
            if not at_end and any(m.startswith(behind) and m != behind for m in markers):
                return  # the text may still become a marker
            opened = next((m for m in markers if behind.startswith(m)), None)
            if opened is None:  # the rest is in the required format
                self._may_think = self._may_call = False
                yield from self._give(_CONTENT, len(self._text))
                return
            at = space
        else:
            at, opened = _first(self._text, markers)
            if opened is None:
                held = 0 if at_end else max((_tail(self._text, m) for m in markers), default=0)
                yield from self._give(_CONTENT, len(self._text) - held)
                return
        yield from self._give(_CONTENT, at)
        yield from self._close()
        self._text = self._text[len(opened) :]
        self._region, self._json = markers[opened], _JsonDepth()
        yield from self._give(self._region, 0)

    def _until(self, marker: str, *, at_end: bool) -> Iterator[Event]:
        """Read the rest of the reasoning."""
        at = self._text.find(marker)
        if at < 0:
            held = 0 if at_end else _tail(self._text, marker)
            yield from self._give(_REASONING, len(self._text) - held)
            return
        yield from self._give(_REASONING, at)
        yield from self._close()
        self._text = self._text[len(marker) :]
        self._may_think = self._tags.is_free

    def _follow_json(self, *, at_end: bool) -> Iterator[Event]:
        """Read calls. Their region ends with its marker after a whole JSON value."""
        assert self._tags.calls is not None
        close = self._tags.calls.close
        n_json = self._json.take(self._text)
        yield from self._give(_CALLS, n_json)
        if not self._json.is_whole:
            return
        if (behind := self._text.lstrip("\n ")).startswith(close):
            yield from self._close()
            self._text = behind[len(close) :]
        elif at_end:
            yield from self._give(_CALLS, len(self._text))

    def _give(self, region: str, n_chars: int) -> Iterator[Event]:
        if region == _CONTENT and not n_chars:
            return
        if not self._is_open:
            self._region, self._is_open = region, True
            yield {"type": "region_open", "field": region}
        if n_chars:
            text, self._text = self._text[:n_chars], self._text[n_chars:]
            yield {"type": "region_chunk", "field": region, "text": text}

    def _close(self) -> Iterator[Event]:
        if self._is_open:
            yield {"type": "region_close", "field": self._region, "value": None}
        self._region, self._is_open = "", False


class _JsonDepth:
    """Counts the open brackets of a piece of JSON, outside of strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.is_whole = False  # an object or a list has ended

    def take(self, text: str) -> int:
        """Return how many characters of ``text`` belong to the JSON value."""
        for position, char in enumerate(text):
            if self.is_whole:
                return position
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "[{":
                self._depth += 1
            elif char in "]}":
                self._depth -= 1
                self.is_whole = self._depth == 0
        return len(text)


def _first(text: str, markers: Mapping[str, str]) -> tuple[int, str | None]:
    """Return the position of the first marker, and the marker."""
    matches = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    at, _, marker = min(matches, default=(0, 0, None))
    return at, marker


def _tail(text: str, marker: str) -> int:
    """Return how many characters at the end of ``text`` may begin ``marker``."""
    for n_chars in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:n_chars]):
            return n_chars
    return 0
