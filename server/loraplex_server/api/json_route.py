"""Routes whose JSON bodies orjson reads, if the Content-Type is JSON."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loraplex_server.errors import ApiError

from .json_size import check_size

_SMALL = 100_000  # bytes of a body that is parsed without yielding


async def read_json(request: Request) -> Any:
    """Return the body's values. Raises ApiError (400) beyond the limits, and orjson's error."""
    body = await request.body()
    is_small = len(body) <= _SMALL
    if not is_small:
        await asyncio.sleep(0)  # between joining the pieces and scanning them
    await check_size(body)
    if is_small:
        return orjson.loads(body)
    values = _parsed(body)
    await asyncio.sleep(0)
    return values


def need_json(request: Request) -> None:
    """Raises ApiError (415) for forms and texts, which foreign pages can send without preflight."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send application/json", code="unsupported_media_type")


class _Request(Request):
    async def json(self) -> Any:
        return await read_json(self)


class JsonRoute(APIRoute):
    """Reads the body. FastAPI validates it against the route's model."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None:
                need_json(request)
            try:
                return await handler(_Request(request.scope, request.receive))
            except HTTPException as error:
                # FastAPI reports every error while the body is read as a parse error.
                if isinstance(error.__cause__, ApiError | ClientDisconnect):
                    raise error.__cause__ from None
                raise

        return handle


def _parsed(body: bytes) -> Any:
    """Parse without the garbage collector, which would scan all new lists repeatedly."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(body)
    finally:
        if is_collecting:
            gc.enable()
