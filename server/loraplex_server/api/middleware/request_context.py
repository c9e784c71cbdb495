"""Adds request ids, timing headers, access log and metrics. Unexpected exceptions become 500."""

import asyncio
import logging
import re
import uuid
from time import perf_counter

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.request_info import CURRENT_REQUEST_ID, RequestInfo
from loraplex_server.errors import from_unexpected, unavailable
from loraplex_server.health_tracker import log_extra
from loraplex_server.metrics.server_metrics import ServerMetrics

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_log = logging.getLogger("loraplex.access")


class RequestContext:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        info = RequestInfo(_request_id(scope))
        info.attach(scope)
        token = CURRENT_REQUEST_ID.set(info.id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, info)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # a server that stops cancels the requests that still run
            if not status:
                stopping = unavailable(
                    "the server stopped before the answer was ready; send the request elsewhere",
                    "server_draining",
                )
                answer = ORJSONResponse.of_error(stopping, scope["path"])
                await answer(scope, receive, send_with_headers)
            raise
        except Exception as error:
            _log.exception("%s %s failed", scope["method"], scope["path"], extra=log_extra(error))
            if not status:
                answer = ORJSONResponse.of_error(from_unexpected(error, info.id), scope["path"])
                await answer(scope, receive, send_with_headers)
        finally:
            self._record(scope, info, status or 499)
            CURRENT_REQUEST_ID.reset(token)

    def _record(self, scope: Scope, info: RequestInfo, status: int) -> None:
        seconds = perf_counter() - info.started
        handler = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.answered(handler, scope["method"], status, seconds)
        if info.record is not None:
            self._metrics.calls.end(info.record, seconds=seconds, status=status)
        # A decoded path may hold line breaks, but a log record is one line.
        path = scope["path"] if scope["path"].isprintable() else ascii(scope["path"])
        _log.info(
            "%s %s %d %.1f ms%s",
            scope["method"],
            path[:256],
            status,
            seconds * 1000,
            "" if info.adapter is None else f"  {info.adapter}",
            extra={
                "method": scope["method"],
                "path": path[:256],
                "status": status,
                "duration_ms": round(seconds * 1000, 2),
                "adapter": info.adapter,
                "tenant": info.tenant or None,
                "prompt_tokens": info.n_prompt_tokens,
                "output_tokens": info.n_output_tokens,
            },
        )


def _request_id(scope: Scope) -> str:
    """Return the client's id if it is safe in logs and headers, else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
            return str(value, "ascii")
    return f"req-{uuid.uuid4().hex}"


def _add_headers(message: Message, info: RequestInfo) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = headers["request-id"] = info.id  # the latter for Anthropic's clients
    headers["openai-processing-ms"] = str(round((perf_counter() - info.started) * 1000))
    if info.adapter is not None:
        headers["x-loraplex-adapter"] = info.adapter
    if info.meter is not None:
        headers.update(info.meter.headers())
