"""Limits of connections: their number, a request's head, and the pace of its body.

uvicorn's parser has no such limits. A head above ``MAX_HEAD_BYTES`` is refused, and so are two
``Host`` headers and fields behind a chunked body. A connection is closed

- if a head takes more than ``HEAD_S`` seconds;
- if a body comes slower than ``MIN_BODY_BYTES`` in ``BODY_CHECK_S`` seconds while the application
  reads;
- if a body takes more than ``N_GRACE_CHECKS`` times as long, and its request is answered or it
  comes slower than ``LATER_BODY_BYTES`` in ``BODY_CHECK_S``;
- ``LINGER_S`` seconds after the last answer, if the body of its request has not ended.

Every refusal is the usual error object, where uvicorn would answer with plain text.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from loraplex_server.api.middleware.auth import PROBES
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.request_info import came_with_key

from .connection_limit import ConnectionLimit, Group
from .errors import ApiError, unavailable

MAX_HEAD_BYTES = 64 << 10  # request line and headers
MAX_HEADERS = 100
MAX_PIPELINED = 16  # requests that wait on a connection for the answer to an earlier one
HEAD_S = 10.0
BODY_CHECK_S = 10.0
MIN_BODY_BYTES = 10 << 10
N_GRACE_CHECKS = 6
LATER_BODY_BYTES = 160 << 10
LINGER_S = 5.0
_ALWAYS_ANSWERED = frozenset(path.encode() for path in (*PROBES, "/metrics"))


class _Refused(Exception):
    """Stops the parser. uvicorn then calls send_400_response."""


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    error = unavailable(
        "the server answers as many connections as it accepts; try again, or let the operator "
        "raise --max-connections",
        "too_many_connections",
        retry_after_s=1.0,
    )
    error.headers["connection"] = "close"
    await ORJSONResponse.of_error(error, scope["path"])(scope, receive, send)


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol with the limits above. uvicorn creates one for each connection."""

    _in_head = False  # between the first byte of a request and the end of its headers
    _in_body = False  # from there to the end of its body
    _is_behind_chunk_head = False  # of the last chunk, too, behind which trailers would come
    _is_lingering = False  # the last answer is complete; what still comes is dropped
    _has_key = False  # a request came with a valid API key
    _refusal: ApiError | None = None
    _n_head_bytes = 0
    _n_body_bytes = 0  # since the last check of the pace
    _n_checks = 0  # of the pace of this body
    _timer: asyncio.TimerHandle | None = None

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limit: ConnectionLimit | None = None,
    ) -> None:
        """``limit`` is shared by the connections of a server. None: there is no limit."""
        super().__init__(config, server_state, app_state, _loop)
        self._limit = limit or ConnectionLimit(None)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._limit.make_room():
            transport.abort()
            return
        self._regroup()
        self._start(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)
        self._limit.remove(self)

    def evict(self) -> None:
        """Close the connection without waiting for a client that does not read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            return
        was_in_head, was_behind = self._in_head, self._is_behind_chunk_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._regroup()
        if was_behind and self._is_behind_chunk_head and data != b"\r":
            self._refuse(_trailers())  # a body's byte, or the end of the body, would have ended it
        elif self._in_head:
            self._n_head_bytes = len(data) + (self._n_head_bytes if was_in_head else 0)
            if self._n_head_bytes > MAX_HEAD_BYTES:
                self._refuse(_head_too_large())
            elif not was_in_head:
                self._start(HEAD_S, self.transport.close)
        elif self._timer is None and not self._is_busy:  # uvicorn has stopped its own timer
            self._start(self.timeout_keep_alive, self.transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            self._stop_parsing(_trailers())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        n_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if n_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._stop_parsing(_head_too_large())
        if sum(name == b"host" for name, _ in self.headers) > 1:
            self._stop_parsing(_invalid("the request has more than one Host header"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(_invalid("too many requests came before their answers"))
        self._in_head = False
        self._n_head_bytes = self._n_body_bytes = self._n_checks = 0
        self._start(BODY_CHECK_S, self._check_pace)
        self._limit.put(self, Group.BUSY_WITH_KEY if self._has_key else Group.BUSY)
        is_probe = self.url.partition(b"?")[0] in _ALWAYS_ANSWERED
        is_full = not is_probe and self._limit.is_exceeded(
            len(self.tasks) + 1, has_key=self._has_key
        )
        self.app = _too_many_connections if is_full else self.config.loaded_app
        super().on_headers_complete()
        self._in_body = True
        self.cycle.transport = SimpleNamespace(  # type: ignore[assignment]
            write=self.transport.write,
            is_closing=self.transport.is_closing,
            close=self._close_answered,
        )

    def on_chunk_header(self) -> None:
        """Called by the parser behind the head of every chunk."""
        self._is_behind_chunk_head = True

    def on_body(self, body: bytes) -> None:
        self._is_behind_chunk_head = False
        self._n_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = self._is_behind_chunk_head = False
        self._stop()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._regroup()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._regroup()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._regroup()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or _invalid("this is no valid HTTP request"))

    def _stop_parsing(self, refusal: ApiError) -> None:
        """Raises ``_Refused``."""
        self._refusal = refusal
        raise _Refused

    def _refuse(self, error: ApiError) -> None:
        self._stop()
        if self._is_answering():
            self.transport.close()
            return
        body = error.body()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s"
            % (error.status, HTTPStatus(error.status).phrase.encode(), len(body), body)
        )
        self.transport.close()

    def _is_answering(self) -> bool:
        """Return True while the parsed request, or an earlier one, has an answer or awaits it."""
        cycle = self.cycle
        if self.pipeline:
            return True
        if cycle is None or cycle.response_complete:
            return self._in_body
        return cycle.response_started or not cycle.more_body

    def _close_answered(self) -> None:
        """Close behind the last answer, once the client has had the time to read it.

        A close with unread bytes resets the connection, and the answer may be lost.
        """
        if not self._in_body or self.pipeline or self.transport.is_closing():
            self.transport.close()
            return
        self._is_lingering = True
        self.transport.write_eof()
        self._start(LINGER_S, self.transport.close)

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _regroup(self) -> None:
        """Tell the limit that bytes went through the connection."""
        if self not in self.connections:  # it is lost
            return
        self._has_key |= self.cycle is not None and came_with_key(self.cycle.scope)
        if self._has_key:
            self._limit.put(self, Group.BUSY_WITH_KEY if self._is_busy else Group.IDLE_WITH_KEY)
        elif self._is_busy:
            self._limit.put(self, Group.UNREAD if self.flow.write_paused else Group.BUSY)
        else:
            self._limit.put(self, Group.IDLE)

    def _check_pace(self) -> None:
        """Close the connection of a slow body, unless the application does not read."""
        if not self.flow.read_paused:
            self._n_checks += 1
            is_early = self._n_checks <= N_GRACE_CHECKS
            least = MIN_BODY_BYTES if is_early else LATER_BODY_BYTES
            if self._n_body_bytes < least or not (is_early or self._is_busy):
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


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_http")


def _trailers() -> ApiError:
    return _invalid("header fields behind a chunked body are not accepted; send them before it")


def _head_too_large() -> ApiError:
    return ApiError(
        431,
        f"the request's head is larger than {MAX_HEAD_BYTES} bytes or has more than "
        f"{MAX_HEADERS} headers",
        code="head_too_large",
    )
