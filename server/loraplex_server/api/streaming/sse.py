"""Server-sent events over ASGI: pings, errors in the stream, clients that disconnect."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.request_info import info_of
from loraplex_server.api.serving.disconnect import client_left
from loraplex_server.errors import ApiError, from_unexpected

_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class SseForm(NamedTuple):
    """The frame of an API's streams: pings, the end, and errors."""

    ping: bytes
    end: bytes
    error: Callable[[ApiError], bytes]


OPENAI_SSE = SseForm(b": ping\n\n", _DONE, lambda error: b"data: " + error.body() + b"\n\n")


def sse_event(name: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


class SseResponse(Response):
    """Sends the output of ``events``, then the end of ``form``.

    The status is sent with the first event or the first ping. An error before that has its own
    status; a later error is an event of the stream. When the client disconnects, ``events`` is
    closed, whether the ASGI server sends ``http.disconnect`` or ``send`` raises.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, ping_s: float, form: SseForm = OPENAI_SSE
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._ping_s = ping_s
        self._form = form
        self._started = False
        self._ended = False  # the last byte is sent, and no ping may follow
        self._sent_at = 0.0
        self._sending = asyncio.Lock()  # pings come from another task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        pump = asyncio.create_task(self._pump(scope, receive, send))
        others = [
            asyncio.create_task(client_left(receive)),
            asyncio.create_task(self._ping(send)),
        ]
        try:
            await asyncio.wait([pump, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, *others):
                task.cancel()
            await asyncio.gather(pump, *others, return_exceptions=True)
            await self._events.aclose()
        if not pump.cancelled() and pump.exception() is not None:
            raise pump.exception()  # type: ignore[misc]  # not None, as asked the line before

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises unexpected exceptions for the log, after the client's answer."""
        failure: Exception | None = None
        with suppress(OSError):  # the client disconnected
            while True:
                try:
                    events = await anext(self._events, None)
                except ApiError as error:
                    await self._fail(error, scope, receive, send)
                    break
                except Exception as error:
                    failure = error
                    shown = from_unexpected(error, info_of(scope).id)
                    await self._fail(shown, scope, receive, send)
                    break
                await self._send(send, self._form.end if events is None else events)
                if events is None:
                    break
            async with self._sending:
                if not self._ended:
                    self._ended = True
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        if failure is not None:
            raise failure

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        info_of(scope).failed(error.code)
        async with self._sending:
            if not self._started:
                self._ended = True
                await ORJSONResponse.of_error(error, scope["path"])(scope, receive, send)
        if not self._ended:
            await self._send(send, self._form.error(error) + self._form.end)

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._sending:
            if self._ended:
                return
            if not self._started:
                self._started = True
                await send(
                    {"type": "http.response.start", "status": 200, "headers": list(_HEADERS)}
                )
            await send({"type": "http.response.body", "body": body, "more_body": True})
        self._sent_at = asyncio.get_running_loop().time()

    async def _ping(self, send: Send) -> None:
        """Send pings, so that proxies wait during prefill and loads of adapters."""
        loop = asyncio.get_running_loop()
        while True:
            wait_s = self._sent_at + self._ping_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await self._send(send, self._form.ping)
