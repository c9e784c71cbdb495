"""Turns exceptions of routes into JSON error answers."""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import Scope

from loraplex_server.engine.errors import EngineError
from loraplex_server.errors import ApiError, from_engine

from .adapter_path import why_not_put
from .compat.other_routes import OTHER_ROUTES
from .orjson_response import ORJSONResponse
from .request_info import info_of
from .serving.disconnect import ClientLeft
from .validation import problem_of

_CODES = {404: "unknown_url", 405: "method_not_allowed"}


def add_error_handlers(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """``routers``: all of the application's, to list the methods that a path allows."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError | EngineError)
        shown = error if isinstance(error, ApiError) else from_engine(error)
        info_of(request.scope).failed(shown.code)
        return ORJSONResponse.of_error(shown, request.scope["path"])

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        path = request.scope["path"]  # the path of request.url depends on the Host header
        if error.status_code == 405 and (allowed := _allowed_methods(request.scope, routers)):
            headers["Allow"] = allowed
        reason = why_not_put(request.method, path) or error.detail
        if error.status_code == 404 and path.endswith("/"):
            bare = path.rstrip("/")
            if _allowed_methods({**request.scope, "path": bare}, routers):
                reason = f"{reason}; use {bare}, without the slash at its end"
        if error.status_code in _CODES and path in OTHER_ROUTES:
            reason = f"{reason}; this server has {OTHER_ROUTES[path]}"
        shown = ApiError(
            error.status_code,
            f"{request.method} {path}: {reason}",
            code=_CODES.get(error.status_code, "invalid_request"),
            headers=headers,
        )
        return ORJSONResponse.of_error(shown, request.scope["path"])

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return ORJSONResponse.of_error(problem_of(error.errors()), request.scope["path"])

    async def client_left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # for the log: no client reads it

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(EngineError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(ClientLeft, client_left)  # during the answer
    app.add_exception_handler(ClientDisconnect, client_left)  # during the request's body


def _allowed_methods(scope: Scope, routers: Sequence[APIRouter]) -> str:
    """Join the methods of every route with this path. Starlette's 405 lists the first route's."""
    methods: set[str] = set()
    for router in routers:
        for route in router.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                methods |= route.methods or set()
    return ", ".join(sorted(methods))
