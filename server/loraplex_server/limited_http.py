"""Connections with limits: size and time of a request's head, the pace of its body.

uvicorn's parser has none of them. A head is refused once it is larger than ``MAX_HEAD_BYTES``, a
connection is closed when its head is not complete after ``HEAD_S`` seconds or its body comes slower
than ``MIN_BODY_BYTES`` in ``BODY_CHECK_S`` seconds. A body that the application does not read yet
is not slow. One timer for each connection, on the event loop.

Every refusal is the usual error object, also where uvicorn would answer with plain text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraplex_server.api.errors import ApiError, unavailable
from loraplex_server.api.orjson_response import ORJSONResponse

__all__ = ["LimitedHttp"]

MAX_HEAD_BYTES = 64 << 10  # request line and headers
MAX_HEADERS = 100
HEAD_S = 10.0
BODY_CHECK_S = 10.0
MIN_BODY_BYTES = 10 << 10


class _HeadTooLarge(Exception):
    pass


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    error = unavailable(
        "the server has as many connections open as it accepts; try again, or let the operator "
        "raise --max-connections",
        "too_many_connections",
        retry_after_s=1.0,
    )
    error.headers["connection"] = "close"
    await ORJSONResponse.of_error(error, scope["path"])(scope, receive, send)


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's protocol with limits. Made by uvicorn for each connection."""

    _max_connections: int | None = None
    _in_head = False  # the first byte of a request is there, the end of its headers is not
    _is_too_large = False
    _n_head_bytes = 0
    _n_body_bytes = 0  # since the last look at the pace
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn itself would answer with plain text
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        if self._max_connections is not None and len(self.connections) > 2 * self._max_connections:
            transport.abort()  # between limit and 2 × limit: 503, see on_headers_complete
            return
        self._start(HEAD_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if self.transport.is_closing() or not self._in_head:
            return
        self._n_head_bytes = len(data) + (self._n_head_bytes if was_in_head else 0)
        if self._n_head_bytes > MAX_HEAD_BYTES:
            self._is_too_large = True
            self.send_400_response("")
        elif not was_in_head and self._timer is None:
            self._start(HEAD_S, self._head_is_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        n_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if n_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._is_too_large = True
            raise _HeadTooLarge  # the parser stops, and uvicorn answers by send_400_response
        self._in_head = False
        self._n_head_bytes = self._n_body_bytes = 0
        self._start(BODY_CHECK_S, self._check_pace)
        limit = self._max_connections
        is_full = limit is not None and max(len(self.connections), len(self.tasks)) >= limit
        self.app = _too_many_connections if is_full else self.config.loaded_app
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._n_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._is_too_large:
            self._refuse(
                431,
                "Request Header Fields Too Large",
                ApiError(
                    431,
                    f"the request's head is larger than {MAX_HEAD_BYTES} bytes or has more than "
                    f"{MAX_HEADERS} headers",
                    code="head_too_large",
                ),
            )
        else:
            error = ApiError(400, "this is no valid HTTP request", code="invalid_http")
            self._refuse(400, "Bad Request", error)

    def _refuse(self, status: int, reason: str, error: ApiError) -> None:
        self._stop()
        if self._is_answering():
            self.transport.close()
            return
        body = error.body()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status, reason.encode(), len(body), body)
        )
        self.transport.close()

    def _is_answering(self) -> bool:
        """Whether an answer to an earlier request is under way: nothing may go between."""
        cycle = self.cycle
        if self.pipeline:
            return True
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started or not cycle.more_body

    def _head_is_late(self) -> None:
        self.transport.close()

    def _check_pace(self) -> None:
        """The body must have come on, unless it is the application that does not read."""
        if self._n_body_bytes < MIN_BODY_BYTES and not self.flow.read_paused:
            self.transport.close()
            return
        self._n_body_bytes = 0
        self._start(BODY_CHECK_S, self._check_pace)

    def _start(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
