"""Reads tool calls from JSON while it arrives: each name first, then its arguments as text.

Accepts ``[{"name": "f", "arguments": {…}}, …]`` and a single object, with ``parameters`` as a
synonym of ``arguments``. Arguments are passed on as the model wrote them.
"""

import json
from enum import Enum
from typing import NamedTuple

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class CallPiece(NamedTuple):
    """A piece with a name opens a call; others continue the arguments of the last call."""

    name: str | None
    arguments: str


class _At(Enum):
    """The reader's position in the JSON."""

    CALLS = "between calls"
    KEY = "before a key"
    COLON = "behind a key"
    VALUE = "before a value"
    INSIDE = "in a value"
    BEHIND = "behind a value"


class ToolCallReader:
    """Reads the text of one region.

    ``broken``: the text is no JSON of calls, and no piece follows. ``unread``: its rest.
    """

    def __init__(self) -> None:
        self.broken = False
        self.unread = ""
        self._at = _At.CALLS
        self._key = ""
        self._value = ""  # the key's value so far
        self._depth = 0  # open brackets in the value
        self._in_string = self._escaped = False
        self._is_text = False  # the value is a string
        self._name: str | None = None
        self._early = ""  # arguments that came before the name
        self._out: list[CallPiece] = []

    def feed(self, text: str) -> list[CallPiece]:
        self._out = []
        for position, char in enumerate(text):
            self._step(char)
            if self.broken:
                self.unread = text[position:]
                break
        self._pass_on()
        return _merged(self._out)

    def _step(self, char: str) -> None:
        if self._at is _At.INSIDE:
            self._inside(char)
        elif char in _SPACE:
            return
        elif self._at is _At.CALLS:
            if char == "{":
                self._at, self._name, self._early = _At.KEY, None, ""
            elif char not in "[],":
                self.broken = True
        elif self._at is _At.COLON:
            self._at = _At.VALUE
            self.broken = char != ":"
        elif self._at is _At.VALUE:
            self._at, self._value, self._depth = _At.INSIDE, "", 0
            self._is_text = char == '"'
            self._inside(char)
        else:
            self._between_keys(char)

    def _between_keys(self, char: str) -> None:
        if char == "}":
            self._end_call()
        elif char == '"' and self._at is _At.KEY:
            self._at, self._value, self._key, self._depth = _At.INSIDE, '"', "", 0
            self._in_string = True
        elif char == "," and self._at is _At.BEHIND:
            self._at = _At.KEY
        else:
            self.broken = True

    def _inside(self, char: str) -> None:
        """A key's or a value's next character."""
        if self._in_string:
            self._value += char
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if self._depth == 0:
                    self._end_value()
            return
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]" and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._value += char
                self._end_value()
                return
        elif self._depth == 0 and char in ",}" + _SPACE:  # after a number, true, false or null
            self._end_value()
            self._step(char)
            return
        self._value += char

    def _end_value(self) -> None:
        if not self._key:
            self._key = _text(self._value) or "?"
            self._at = _At.COLON
            return
        key, value = self._key, self._value
        self._pass_on()
        self._at, self._key, self._value = _At.BEHIND, "", ""
        if key == "name":
            self._name = _text(value)
            if self._name is None:
                self.broken = True
                return
            self._out.append(CallPiece(self._name, self._early))
        elif key in _ARGUMENTS and self._is_text:  # JSON in a string
            self._arguments(_text(value) or "")

    def _end_call(self) -> None:
        self.broken = self._name is None
        self._at = _At.CALLS

    def _pass_on(self) -> None:
        """Emit the arguments so far, unless they are a string."""
        if self._at is _At.INSIDE and self._key in _ARGUMENTS and self._value and not self._is_text:
            self._arguments(self._value)
            self._value = ""

    def _arguments(self, text: str) -> None:
        if self._name is None:
            self._early += text
        else:
            self._out.append(CallPiece(None, text))


def _text(literal: str) -> str | None:
    try:
        value = json.loads(literal)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _merged(pieces: list[CallPiece]) -> list[CallPiece]:
    merged: list[CallPiece] = []
    for piece in pieces:
        if piece.name is None and merged:
            last = merged.pop()
            piece = CallPiece(last.name, last.arguments + piece.arguments)
        merged.append(piece)
    return merged
