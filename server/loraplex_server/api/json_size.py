"""Limits of a JSON text, which are checked before it is parsed.

Parsing blocks all requests: even a parser in a thread holds the interpreter's lock.
"""

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

from loraplex_adapter_store.files.json_size import MAX_DEPTH, is_too_deep, json_size
from loraplex_server.errors import invalid

MAX_VALUES = 150_000  # list items, keys and values of objects


class JsonProblem(NamedTuple):
    text: str  # continues a sentence, as "the body …"
    code: str


TOO_DEEP = JsonProblem(
    f"nests lists and objects deeper than the limit of {MAX_DEPTH}; flatten it", "too_deep"
)
_TOO_MANY = JsonProblem(
    f"has more than {MAX_VALUES:,} keys and values, which is the limit; send fewer in one call, or "
    "texts instead of token ids",
    "too_many_values",
)


async def check_size(body: bytes) -> None:
    """Raises ApiError (400) for a body beyond the limits. Yields to the event loop."""
    for problem in _problems(body):
        if problem is not None:
            raise invalid(f"the body {problem.text}", None, problem.code)
        await asyncio.sleep(0)


def size_problem(text: bytes) -> JsonProblem | None:
    """Return the limit that the text exceeds. Blocks on long texts."""
    return next(filter(None, _problems(text)), None)


def _problems(text: bytes) -> Iterator[JsonProblem | None]:
    """Yield None after each piece, or the problem."""
    if len(text) <= MAX_VALUES and not is_too_deep(text):  # each value has at least one character
        return
    for size in json_size(text):
        if size.depth > MAX_DEPTH:
            yield TOO_DEEP
        else:
            yield _TOO_MANY if size.n_values > MAX_VALUES else None
