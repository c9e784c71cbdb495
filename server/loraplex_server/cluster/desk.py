"""What one process has to keep is asked of one process: the deployment ``Desk``.

Files, batches, jobs and stored responses live in the memory or the folder of the gateway that made
them, and the next request may come to another one. So there is one gateway more, in one replica,
that has them, and the others pass such requests on to it, whole.

    client ── gateway ── ``ToDesk`` ── request, body ──▶ ``answered_by`` ── the Desk's application
                              ◀── messages of its answer ──
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.errors import ApiError, unavailable
from loraplex_server.api.middleware.auth import Auth
from loraplex_server.api.middleware.body_limit import BodyLimit
from loraplex_server.api.middleware.browser_guard import BrowserGuard
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.serving.disconnect import client_left
from loraplex_server.api.serving.responses_format import stream_error
from loraplex_server.api_keys import ApiKey
from loraplex_server.settings import HttpConfig

__all__ = ["PassedOn", "answered_by", "to_desk"]

_RESPONSES = "/v1/responses"
_KEPT = (
    *("/v1/files", "/v1/batches", "/v1/jobs", _RESPONSES),
    *("/v1/adapters/generate", "/v1/adapters/train"),
)
_FIELDS = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


class PassedOn(NamedTuple):
    """A request, as it crosses processes."""

    fields: dict[str, object]  # of the ASGI scope
    client: tuple[str, int] | None
    body: bytes


def to_desk(
    app: ASGIApp, desk: DeploymentHandle, http: HttpConfig, meter_of: Callable[[ApiKey], Meter]
) -> ASGIApp:
    """``app`` for all requests but those that the desk has to answer; ``meter_of``: as of both."""
    passing = BrowserGuard(BodyLimit(_ToDesk(desk, Auth(app, http, meter_of)), http), http)

    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        is_kept = scope["type"] == "http" and _is_kept(scope)
        await (passing if is_kept else app)(scope, receive, send)

    return choose


async def answered_by(app: ASGIApp, request: PassedOn) -> AsyncGenerator[list[Message]]:
    """The messages of the answer, as they come. Closing it early is the client leaving."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "root_path": "",
        "server": None,
        "client": request.client,
        **request.fields,
    }
    messages: list[Message] = []
    arrived, left = asyncio.Event(), asyncio.Event()
    unread = [request.body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.append(message)
        arrived.set()

    answering = asyncio.ensure_future(app(scope, receive, send))
    answering.add_done_callback(lambda _: arrived.set())
    try:
        while not (answering.done() and not messages):
            await arrived.wait()
            arrived.clear()
            taken, messages[:] = list(messages), []
            if taken:
                yield taken
        await answering  # raises what it raised
    finally:
        left.set()
        await asyncio.wait([answering], timeout=1.0)
        answering.cancel()


class _ToDesk:
    """Holds whole bodies, so it reads none of a caller whom the desk refuses for the head alone."""

    def __init__(self, desk: DeploymentHandle, auth: Auth) -> None:
        self._desk = desk.options(stream=True, method_name="answer")
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _Sent()

        async def pass_on() -> None:
            async for messages in response:
                for message in messages:
                    sent.count(message)
                    await send(message)

        try:
            if await self._auth.may_send_body(scope):
                body = await _body(receive)
            else:
                body, receive = b"", _nothing
            fields = {name: scope[name] for name in _FIELDS}
            response = self._desk.remote(PassedOn(fields, scope.get("client"), body))
            passing = asyncio.ensure_future(pass_on())
            leaving = asyncio.ensure_future(client_left(receive))
            try:
                await asyncio.wait([passing, leaving], return_when=asyncio.FIRST_COMPLETED)
                if not passing.done():
                    response.cancel()
                else:
                    await passing
            finally:
                for task in (passing, leaving):
                    task.cancel()
                await asyncio.gather(passing, leaving, return_exceptions=True)
        except (ApiError, RayError, RayServeException) as error:
            told = error
            if not isinstance(error, ApiError):
                told = unavailable("what keeps files, batches and jobs was lost", "desk_lost", 2.0)
            if not sent.started:
                await ORJSONResponse.of_error(told, scope["path"])(scope, receive, send)
            elif sent.is_stream and not sent.ended and scope["path"] == _RESPONSES:
                body = stream_error(told, sent.n_events)
                await send({"type": "http.response.body", "body": body, "more_body": False})
            else:
                raise  # a stream that breaks off: only a response's has an event for it


class _Sent:
    """What a client has got of an answer."""

    def __init__(self) -> None:
        self.started = self.ended = False
        self.is_stream = False  # of events
        self.n_events = 0

    def count(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.is_stream = kind.startswith(b"text/event-stream")
            return
        body = message.get("body", b"")
        self.n_events += body.startswith(b"event: ") + body.count(b"\nevent: ")
        self.ended = not message.get("more_body", False)


async def _nothing() -> Message:
    """Never comes: a ``receive`` that leaves the body where it is."""
    message: Message = await asyncio.get_running_loop().create_future()
    return message


async def _body(receive: Receive) -> bytes:
    """Raises ApiError (413)."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


def _is_kept(scope: Scope) -> bool:
    path = scope["path"]
    if scope["method"] == "PUT":
        return False  # of an adapter, by a name that none may have; a file as large as adapters are
    return any(path == kept or path.startswith(f"{kept}/") for kept in _KEPT)
