"""Routes whose JSON is read by orjson, and only where the client says that it is JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .errors import ApiError, invalid

__all__ = ["JsonRoute", "need_json"]


_MAX_VALUES = 150_000  # more hold up everybody: a parser in a thread keeps the interpreter's lock


class _Request(Request):
    async def json(self) -> Any:  # as Starlette has it
        body = await self.body()
        if len(body) <= _MAX_VALUES:
            return orjson.loads(body)
        _check_values(body)
        await asyncio.sleep(0)  # another's turn
        values = orjson.loads(body)
        await asyncio.sleep(0)
        return values


def need_json(request: Request) -> None:
    """Raises ApiError (415): a form or a text is what a foreign web page can send unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send application/json", code="unsupported_media_type")


class JsonRoute(APIRoute):
    """FastAPI validates the body against the route's model; this reads it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None:
                need_json(request)
            try:
                return await handler(_Request(request.scope, request.receive))
            except HTTPException as error:
                # FastAPI calls whatever happens while the body is read a parse error.
                if isinstance(error.__cause__, ApiError | ClientDisconnect):
                    raise error.__cause__ from None
                raise

        return handle


def _check_values(body: bytes) -> None:
    """Raises ApiError (400) for a body of more values than are read in one call."""
    n_values = _count(body, ",")
    if n_values > _MAX_VALUES:  # perhaps in texts
        quoted = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        if _count(quoted, '"') <= 4 * _MAX_VALUES:  # keys and values
            n_values = _count(b"".join(quoted.split(b'"')[::2]), ",")
    if n_values > _MAX_VALUES:
        raise invalid(
            f"the body has {n_values:,} values, at most {_MAX_VALUES:,} are read; send fewer in "
            "one call, or texts instead of token ids",
            None,
            "too_many_values",
        )


def _count(body: bytes, character: str) -> int:
    """Ten times as fast as ``bytes.count`` where there are many."""
    return int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord(character)))
