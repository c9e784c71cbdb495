"""Reads the JSONL of a batch: one call a line, ``{"custom_id", "method", "url", "body"}``.

Checks training files, too, whose lines `training_lines` parses.

Imports little, since a worker process checks uploaded files (`file_checks`).
"""

import os
from collections.abc import Collection, Iterator
from typing import BinaryIO, NamedTuple

import orjson
from pydantic import JsonValue

from loraplex_server.adapters.fine_tuning.training_lines import parse_line
from loraplex_server.api.json_size import size_problem
from loraplex_server.errors import ApiError, invalid

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_MAX_ID = 512  # characters
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


class InputLine(NamedTuple):
    """A call of a batch."""

    number: int  # from 1, blank lines counted
    custom_id: str
    endpoint: str
    body: bytes  # JSON


def check_input(path: str, max_lines: int, max_line_bytes: int) -> tuple[int, list[str]]:
    """Check the whole file and flush it to the disk. Blocks for seconds.

    Return the number of calls and their endpoints. Raises ApiError (400), which names the line.
    """
    seen: dict[str, int] = {}
    endpoints = set()
    with open(path, "rb") as file:
        for number, text in _checked_lines(file, max_lines, max_line_bytes):
            line = _line(number, text)
            if line.custom_id in seen:
                raise _bad(
                    line.number,
                    f"custom_id {line.custom_id[:64]!r} is also that of line "
                    f"{seen[line.custom_id]}; give each line its own",
                )
            seen[line.custom_id] = line.number
            endpoints.add(line.endpoint)
        os.fsync(file.fileno())
    if not seen:
        raise invalid("the file has no lines", "file", "invalid_file")
    return len(seen), sorted(endpoints)


def check_training_file(path: str, max_lines: int, max_line_bytes: int) -> tuple[int, list[str]]:
    """Check a training file and flush it to the disk. Blocks for seconds.

    Return the number of lines and the method that they are for. Raises ApiError (400), which names
    the line.
    """
    methods: dict[str, int] = {}  # method → its first line
    n_lines = 0
    with open(path, "rb") as file:
        for number, text in _checked_lines(file, max_lines, max_line_bytes):
            try:
                line = parse_line(_value(number, text))
            except ValueError as error:
                raise _bad(number, str(error)) from error
            methods.setdefault(line.method, number)
            if len(methods) > 1:
                (first, at), (other, _) = methods.items()
                raise _bad(number, f"is for the method {other!r}, line {at} for {first!r}")
            n_lines += 1
        os.fsync(file.fileno())
    if not n_lines:
        raise invalid("the file has no lines", "file", "invalid_file")
    return n_lines, list(methods)


def read_lines(file: BinaryIO, *, without: Collection[int] = ()) -> Iterator[InputLine]:
    """Yield the lines of a checked file, except the numbers ``without``."""
    for number, text in enumerate(file, start=1):
        if number not in without and text.strip():
            yield _line(number, text)


def _checked_lines(
    file: BinaryIO, max_lines: int, max_line_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """Yield number and text of the lines, bounded before they are parsed. Raises ApiError (400)."""
    number = 0
    while text := file.readline(max_line_bytes + 1):
        number += 1
        if number > max_lines:
            raise _bad(
                number,
                f"at most {max_lines} lines are accepted, blank ones included; split the file",
            )
        if len(text) > max_line_bytes:
            raise _bad(number, f"is longer than the {max_line_bytes} bytes of a request")
        if (problem := size_problem(text)) is not None:
            raise _bad(number, problem.text)
        if text.strip():
            yield number, text


def _value(number: int, text: bytes) -> JsonValue:
    try:
        value: JsonValue = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _bad(number, f"is not JSON: {error}") from error
    return value


def _line(number: int, text: bytes) -> InputLine:
    value = _value(number, text)
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
        raise _bad(number, "stream is set, but a batch has no streams; remove stream")
    return InputLine(number, custom_id, url, orjson.dumps(body))


def _bad(number: int, problem: str) -> ApiError:
    return invalid(f"line {number}: {problem}", "file", "invalid_file")
