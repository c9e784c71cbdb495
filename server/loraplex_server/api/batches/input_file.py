"""The JSONL of a batch: one call a line, ``{"custom_id", "method", "url", "body"}``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson
from pydantic import JsonValue

from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.json_size import MAX_VALUES, has_too_many_values

from .records import ENDPOINTS

__all__ = ["InputLine", "InputSummary", "check_input", "read_lines"]

_MAX_ID = 512  # characters
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


class InputLine(NamedTuple):
    number: int  # from 1, blank lines counted
    custom_id: str
    endpoint: str
    body: bytes  # JSON


class InputSummary(NamedTuple):
    n_lines: int
    endpoints: tuple[str, ...]


def check_input(path: Path, *, max_lines: int, max_line_bytes: int) -> InputSummary:
    """Blocks: it reads all of the file. Raises ApiError (400), which names the line."""
    seen: dict[str, int] = {}
    endpoints = set()
    with path.open("rb") as file:
        for line in read_lines(file, max_line_bytes=max_line_bytes):
            if line.custom_id in seen:
                raise _bad(
                    line.number,
                    f"custom_id {line.custom_id[:64]!r} is that of line {seen[line.custom_id]}, "
                    "too; give each line its own",
                )
            seen[line.custom_id] = line.number
            endpoints.add(line.endpoint)
            if len(seen) > max_lines:
                raise _bad(line.number, f"at most {max_lines} lines are accepted; split the file")
    if not seen:
        raise invalid("the file has no lines", "file", "invalid_file")
    return InputSummary(len(seen), tuple(sorted(endpoints)))


def read_lines(file: BinaryIO, *, max_line_bytes: int | None = None) -> Iterator[InputLine]:
    """``max_line_bytes``: of a file that nobody has checked yet. Raises ApiError (400)."""
    number = 0
    size = -1 if max_line_bytes is None else max_line_bytes + 1
    while text := file.readline(size):
        number += 1
        if max_line_bytes is not None and len(text) > max_line_bytes:
            raise _bad(number, f"is longer than the {max_line_bytes} bytes of a request")
        if max_line_bytes is not None and has_too_many_values(text):
            raise _bad(
                number,
                f"has more than {MAX_VALUES:,} keys and values, which is all that is read of a "
                "request; split it, or send texts instead of token ids",
            )
        if text.strip():
            yield _line(number, text)


def _line(number: int, text: bytes) -> InputLine:
    try:
        value: JsonValue = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _bad(number, f"is not JSON: {error}") from error
    if not isinstance(value, dict) or not value.keys() <= _FIELDS:
        raise _bad(number, "must be an object of custom_id, method, url and body")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        raise _bad(number, f"custom_id must be a text of 1 to {_MAX_ID} characters")
    if value.get("method") != "POST":
        raise _bad(number, f"method must be 'POST', not {str(value.get('method'))[:64]!r}")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise _bad(number, f"url must be one of {', '.join(ENDPOINTS)}, not {str(url)[:64]!r}")
    if not isinstance(body, dict):
        raise _bad(number, "body must be an object")
    if body.get("stream"):
        raise _bad(number, "stream is set, and a batch has no streams; leave it out")
    return InputLine(number, custom_id, url, orjson.dumps(body))


def _bad(number: int, problem: str) -> ApiError:
    return invalid(f"line {number}: {problem}", "file", "invalid_file")
