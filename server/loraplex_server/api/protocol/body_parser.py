"""Bytes of a request to a checked body, or a clear 400 that names the field."""

from __future__ import annotations

import logging
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from loraplex_server.api.errors import ApiError, invalid

__all__ = ["BodyParser"]

Body = TypeVar("Body", bound=BaseModel)
_log = logging.getLogger(__name__)
_MAX_WARNED = 1000  # distinct unknown field names; clients choose them, so they are bounded


class BodyParser:
    """Remembers which unknown fields were warned about: one line per field name and server."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    async def parse(self, request: Request, kind: type[Body]) -> Body:
        raw = await request.body()
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise invalid(f"the body is not valid JSON: {error}", None, "invalid_json") from error
        if not isinstance(value, dict):
            raise invalid("the body must be a JSON object", None, "invalid_json")
        try:
            body = kind.model_validate(value)
        except ValidationError as error:
            raise _first_problem(error) from error
        if body.model_extra:
            self._warn(body.model_extra)
        return body

    def _warn(self, extra: dict[str, object]) -> None:
        for name in extra.keys() - self._warned:
            if len(self._warned) >= _MAX_WARNED:
                return
            self._warned.add(name)
            _log.warning("ignoring unknown request field %r", name[:64])


def _first_problem(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_context=False)
    problem = problems[0]
    param = _param(problem["loc"])
    if problem["type"] == "missing":
        return invalid(f"{param!r} is required", param, "missing_required_parameter")
    # A union reports one problem for each alternative: say all that were expected.
    same = [p["msg"] for p in problems if p["loc"][:1] == problem["loc"][:1]]
    expected = "; or ".join(dict.fromkeys(message[0].lower() + message[1:] for message in same[:4]))
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return invalid(f"invalid {param!r}: {expected}, not {shown}", param)


def _param(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "content", "str")`` → ``messages[0].content``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = part
        elif part.isidentifier() and part not in ("str", "int", "list", "dict", "float", "bool"):
            path += f".{part}"
    return path
