"""Every error code that a client can get, and where it comes from, read from the sources."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import loraplex_server

from .tables import cell, table

__all__ = ["ErrorCode", "error_codes", "error_codes_page"]

_HEAD = """# Error codes

Every `code` in the server's sources, with its status and the message in the words of the source
(`…` stands for a value). What they mean and what to do: [HTTP API](../errors.md).
"""
# function → status, the position of the message and of the code, the code if none is given
_MAKERS = {
    "ApiError": (None, 1, None, None),
    "invalid": (400, 0, 2, "invalid_value"),
    "not_found": (404, 0, 2, None),
    "too_many": (429, 0, 1, None),
    "unavailable": (503, 0, 1, None),
    "JsonProblem": (400, 0, 1, None),
    "ImageRefused": (400, 0, 1, None),
}
_STATUSES = {"image_too_large": 413}  # as ``from_image`` says


class ErrorCode(NamedTuple):
    code: str
    status: int
    message: str  # "" where it comes from elsewhere


def error_codes_page() -> str:
    messages: dict[tuple[str, int], set[str]] = defaultdict(set)
    for each in error_codes():
        messages[each.code, each.status].add(each.message)
    rows = [
        (f"`{code}`", str(status), "<br>".join(cell(text) for text in sorted(texts) if text))
        for (code, status), texts in sorted(messages.items())
    ]
    return "\n".join([_HEAD, *table(("code", "status", "messages"), rows)])


def error_codes() -> Iterator[ErrorCode]:
    for path in sorted(Path(loraplex_server.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield from _made_by(node, node.func.id)


def _made_by(call: ast.Call, name: str) -> Iterator[ErrorCode]:
    if name not in _MAKERS:
        return
    status, message_at, code_at, default = _MAKERS[name]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if code_at is not None and len(call.args) > code_at:
        given["code"] = call.args[code_at]
    if status is None and call.args:
        status = next(_constants(call.args[0], int), None)
    code = given.get("code")
    codes = [default] if code is None else list(_constants(code, str))
    message = _text(call.args[message_at]) if len(call.args) > message_at else ""
    for each in codes:
        if isinstance(each, str) and isinstance(status, int):
            yield ErrorCode(each, _STATUSES.get(each, status), message)


def _constants(node: ast.expr, kind: type) -> Iterator[object]:
    """A constant, or both of ``a if … else b``."""
    if isinstance(node, ast.IfExp):
        yield from _constants(node.body, kind)
        yield from _constants(node.orelse, kind)
    elif isinstance(node, ast.Constant) and isinstance(node.value, kind):
        yield node.value


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    return "…" if isinstance(node, ast.FormattedValue) else ""
