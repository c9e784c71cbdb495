"""Measures a JSON text before it is parsed: parsing a hostile text costs more than refusing it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MAX_DEPTH = 100  # nested lists and objects
_PIECE = 256 << 10  # bytes between two yields, about a millisecond
_MARKS = b'"[]{},:'
_NO_MARKS = bytes(set(range(256)) - set(_MARKS))
_STEPS = np.zeros(256, np.int8)  # how a character changes the depth
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class JsonSize(NamedTuple):
    n_values: int  # list items, keys and values of objects, at most one too few
    n_objects: int
    depth: int  # the deepest nesting


def json_size(text: bytes) -> Iterator[JsonSize]:
    """Yield the size of the text up to each piece. Malformed texts have a size, too."""
    n_values = n_objects = depth = deepest = 0
    is_in_string = False
    for piece in _without_escapes(text):
        marks = np.frombuffer(piece.translate(None, _NO_MARKS), np.uint8)
        # uint8 overflows, and odd stays odd
        in_string = np.cumsum(marks == ord('"'), dtype=np.uint8) % 2 != is_in_string
        if in_string.size:
            is_in_string = bool(in_string[-1])
        marks = marks[~in_string]
        n_values += int(np.count_nonzero((marks == ord(",")) | (marks == ord(":"))))
        n_objects += int(np.count_nonzero(marks == ord("{")))
        depths = depth + np.cumsum(_STEPS[marks], dtype=np.int64)
        if depths.size:
            deepest, depth = max(deepest, int(depths.max())), int(depths[-1])
        yield JsonSize(n_values, n_objects, deepest)


def is_too_deep(text: bytes) -> bool:
    """Return True if the text nests deeper than ``MAX_DEPTH``. Blocks on long texts."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return False
    return any(size.depth > MAX_DEPTH for size in json_size(text))


def check_depth(text: str | bytes) -> None:
    """Raises ValueError if the text nests deeper than ``MAX_DEPTH``."""
    if is_too_deep(text.encode() if isinstance(text, str) else text):
        raise ValueError(f"lists and objects nest deeper than the limit of {MAX_DEPTH}")


def _without_escapes(text: bytes) -> Iterator[bytes]:
    """Yield pieces without escaped quotes, so that each quote opens or closes a string."""
    start = 0
    while start < len(text):
        piece = text[start : start + _PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and len(piece) > 1:
            piece = piece[:-1]  # the backslash escapes the next character
        start += len(piece)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        yield piece
