"""Bodies that do not fit their model become a clear 400 that names the field."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from loraplex_server.errors import ApiError, invalid

from .json_route import read_json
from .protocol.body import shown

Body = TypeVar("Body", bound=BaseModel)
_log = logging.getLogger(__name__)
_MAX_WARNED = 1000  # distinct unknown field names that are logged; clients choose the names
_MAX_NAME = 64
_UNION_MEMBERS = frozenset({"str", "int", "list", "dict", "float", "bool"})
_BODIES = frozenset({"TGI", "SGLang"})  # tags of the bodies of /generate
_OBJECT_ERRORS = frozenset({"model_type", "model_attributes_type", "dict_type"})


async def read_body(request: Request, kind: type[Body]) -> Body:
    """Read a body on routes with several kinds of body. Raises ApiError (400)."""
    try:
        values = await read_json(request)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}", None, "invalid_json") from error
    return validated(kind, values)


def validated(kind: type[Body], values: object) -> Body:
    """Parse a body. Raises ApiError (400)."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise problem_of(error.errors(include_url=False)) from error


class UnknownFields:
    """Logs each unknown field name once. Unknown fields are ignored."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def warn(self, names: Iterable[str]) -> None:
        for name in names:
            short = name[:_MAX_NAME]
            if short not in self._warned and len(self._warned) < _MAX_WARNED:
                self._warned.add(short)
                _log.warning("ignoring unknown request field %r", short)


def problem_of(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the first of pydantic's problems, with all alternatives of a union there."""
    problem = problems[0]
    location = tuple(problem["loc"])
    if location[:1] in (("body",), ("query",), ("path",), ("header",)):
        location = location[1:]
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", problem["msg"])
        return invalid(f"the body is not valid JSON: {reason}", None, "invalid_json")
    if not location:
        return invalid("the body must be a JSON object", None, "invalid_json")
    param = _path(location)
    if problem["type"] == "missing":
        return invalid(f"{param!r} is required", param, "missing_required_parameter")
    at = len(problem["loc"]) - len(location) + 1
    same = [_message(p) for p in problems if p["loc"][:at] == problem["loc"][:at]]
    texts = [message.removeprefix("Value error, ") for message in same[:4]]
    expected = "; or ".join(dict.fromkeys(text[0].lower() + text[1:] for text in texts))
    return invalid(f"invalid {param!r}: {expected}, not {shown(problem['input'])}", param)


def _message(problem: Mapping[str, Any]) -> str:
    """Return pydantic's message, with JSON's words in place of Python's."""
    if problem["type"] in _OBJECT_ERRORS:
        return "input should be an object"
    if problem["type"] == "literal_error":
        return re.sub(r"\b(?:True|False)\b", lambda match: match[0].lower(), problem["msg"])
    return str(problem["msg"])


def _path(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "content", "str")`` → ``messages[0].content``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = "" if part in _BODIES else part[:_MAX_NAME]
        elif _is_field(part):
            path += f".{part}"
    return path


def _is_field(part: str) -> bool:
    """Return False for the class names of union members, which pydantic adds to a location."""
    is_class = part in _UNION_MEMBERS or part[:1].isupper()
    return part.isidentifier() and not is_class and len(part) <= _MAX_NAME
