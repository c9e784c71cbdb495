"""Routes whose JSON is read by orjson, and only where the client says that it is JSON."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .errors import ApiError

__all__ = ["JsonRoute", "need_json"]


class _Request(Request):
    async def json(self) -> Any:  # as Starlette has it
        return orjson.loads(await self.body())


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
