"""Routes whose JSON is read by orjson, and only where the client says that it is JSON."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .errors import ApiError
from .json_size import check_n_values

__all__ = ["JsonRoute", "need_json", "read_json"]

_SMALL = 100_000  # bytes, which are parsed at once


async def read_json(request: Request) -> Any:
    """The body's values. Raises ApiError (400) for too many, and orjson's error."""
    body = await request.body()
    if len(body) <= _SMALL:
        return orjson.loads(body)
    await asyncio.sleep(0)  # another's turn
    await check_n_values(body)
    values = _parsed(body)
    await asyncio.sleep(0)
    return values


def need_json(request: Request) -> None:
    """Raises ApiError (415): a form or a text is what a foreign web page can send unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send application/json", code="unsupported_media_type")


class _Request(Request):
    async def json(self) -> Any:  # as Starlette has it
        return await read_json(self)


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


def _parsed(body: bytes) -> Any:
    """Without the garbage collector: it would look at all the new lists time and again."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        if is_collecting:
            gc.enable()
