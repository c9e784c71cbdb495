"""Requests that gateways forward to the coordinator.

Files, batches, jobs and stored responses live in the memory or the folder of one process. The next
request of a client may reach another gateway, so gateways forward such requests.

    client ── gateway ── ForwardedRequest ──▶ answer_forwarded ── the coordinator's application
                      ◀── ASGI messages, or a request for the next piece of the body ──
                      ── BodyPiece ──▶ ForwardedBodies

Large bodies go in pieces, when the application reads them. So neither process holds a file, and the
application counts the bytes of each tenant while they arrive.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.middleware.auth import Auth
from loraplex_server.api.middleware.body_limit import BodyLimit
from loraplex_server.api.middleware.browser_guard import BrowserGuard
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.serving.disconnect import ClientLeft, unless_client_leaves
from loraplex_server.api.serving.responses.responses_format import EventWriter
from loraplex_server.errors import ApiError, unavailable
from loraplex_server.settings.api_keys import ApiKey
from loraplex_server.settings.config import HttpConfig

_RESPONSES = "/v1/responses"
_FORWARDED = (
    *("/v1/files", "/v1/batches", "/v1/jobs", _RESPONSES),
    *("/v1/adapters/generate", "/v1/adapters/train"),
)
_FIELDS = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
_PIECE_BYTES = 1 << 20
_NEXT_PIECE = "loraplex.next_piece"  # type of the message that asks for a piece of the body


class BodyPiece(NamedTuple):
    """The next bytes of a request's body."""

    data: bytes  # ``_PIECE_BYTES`` at most, unless the client's connection brings more at once
    more: bool  # False: the last piece


class ForwardedRequest(NamedTuple):
    """The head of an HTTP request that crosses processes, and the start of its body."""

    id: str
    fields: dict[str, object]  # of the ASGI scope
    client: tuple[str, int] | None
    body: BodyPiece


class ForwardedBodies:
    """The pieces of bodies that gateways have sent, and no application has read. One event loop."""

    def __init__(self) -> None:
        self._awaited: dict[str, asyncio.Future[BodyPiece | None]] = {}  # by request id

    @contextmanager
    def awaiting(self, request_id: str) -> Iterator[asyncio.Future[BodyPiece | None]]:
        """Yield the next piece, for which the gateway is asked within the block."""
        piece: asyncio.Future[BodyPiece | None] = asyncio.get_running_loop().create_future()
        self._awaited[request_id] = piece
        try:
            yield piece
        finally:
            del self._awaited[request_id]

    def put(self, request_id: str, piece: BodyPiece | None) -> None:
        """Hand a piece to the application if it waits for one. None: the client has left."""
        awaited = self._awaited.get(request_id)
        if awaited is not None and not awaited.done():
            awaited.set_result(piece)


def with_forwarding(
    app: ASGIApp,
    coordinator: DeploymentHandle,
    http: HttpConfig,
    meter_of: Callable[[ApiKey], Meter],
) -> ASGIApp:
    """Return ``app`` with the routes in ``_FORWARDED`` answered by the coordinator.

    Callers are checked here before their bodies are read, and counted by the coordinator.
    """
    forwarding = _Forwarding(coordinator, Auth(app, http, meter_of))
    guarded = BrowserGuard(BodyLimit(forwarding, http), http)

    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        is_forwarded = scope["type"] == "http" and _is_forwarded(scope)
        await (guarded if is_forwarded else app)(scope, receive, send)

    return choose


async def answer_forwarded(
    app: ASGIApp, request: ForwardedRequest, bodies: ForwardedBodies
) -> AsyncGenerator[list[Message]]:
    """Yield the ASGI messages of the answer as they come. Closing early cancels the request.

    A message of type ``_NEXT_PIECE`` asks for the next piece of the body, which ``bodies`` gets.
    """
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "root_path": "",
        "server": None,
        "client": request.client,
        **request.fields,
    }
    messages: list[Message] = []
    arrived, left, taken = asyncio.Event(), asyncio.Event(), asyncio.Event()
    unread: BodyPiece | None = request.body
    more, n_unsent = True, 0

    async def receive() -> Message:
        nonlocal unread, more
        if not more:
            await left.wait()
            return {"type": "http.disconnect"}
        piece, unread = unread, None
        if piece is None:
            with bodies.awaiting(request.id) as awaited:
                messages.append({"type": _NEXT_PIECE})
                arrived.set()
                piece = await awaited
        if piece is None:
            return {"type": "http.disconnect"}
        more = piece.more
        return {"type": "http.request", "body": piece.data, "more_body": more}

    async def send(message: Message) -> None:
        nonlocal n_unsent
        messages.append(message)
        arrived.set()
        n_unsent += len(message.get("body", b""))
        if n_unsent >= _PIECE_BYTES:  # a file is not read faster than it is sent
            taken.clear()
            await taken.wait()

    answering = asyncio.ensure_future(app(scope, receive, send))
    answering.add_done_callback(lambda _: arrived.set())
    try:
        while not (answering.done() and not messages):
            await arrived.wait()
            arrived.clear()
            batch, messages[:] = list(messages), []
            if batch:
                yield batch
            if not messages:
                n_unsent = 0
                taken.set()
        await answering  # raises the application's error
    finally:
        left.set()
        taken.set()
        bodies.put(request.id, None)
        await asyncio.wait([answering], timeout=1.0)
        answering.cancel()


class _Forwarding:
    """An ASGI application that forwards each request and relays the answer.

    The headers are checked before the body is read.
    """

    def __init__(self, coordinator: DeploymentHandle, auth: Auth) -> None:
        self._answer = coordinator.options(stream=True, method_name="answer")
        self._put_piece = coordinator.options(method_name="put_piece")
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent, body = _Sent(), _Body(receive)
        request_id = uuid.uuid4().hex
        response: DeploymentResponseGenerator[list[Message]] | None = None

        async def relay(answer: AsyncIterable[list[Message]]) -> None:
            async for messages in answer:
                for message in messages:
                    if message["type"] == _NEXT_PIECE:
                        await self._put_piece.remote(request_id, await body.piece())
                    else:
                        sent.count(message)
                        await send(message)

        try:
            if await self._auth.may_send_body(scope):
                piece = await body.piece()
            else:
                piece, receive = BodyPiece(b"", more=False), _never
            fields = {name: scope[name] for name in _FIELDS}
            request = ForwardedRequest(request_id, fields, scope.get("client"), piece)
            response = self._answer.remote(request)
            await unless_client_leaves(relay(response), body.rest if piece.more else receive)
        except (ClientDisconnect, ClientLeft):
            if response is not None:
                response.cancel()
        except (ApiError, RayError, RayServeException) as error:
            answer = error if isinstance(error, ApiError) else _lost()
            if isinstance(error, ApiError) and response is not None:  # of the body's size
                response.cancel()
            if not sent.started:
                await ORJSONResponse.of_error(answer, scope["path"])(scope, receive, send)
            elif sent.is_stream and not sent.ended and scope["path"] == _RESPONSES:
                last = EventWriter(sent.n_events).error(answer)
                await send({"type": "http.response.body", "body": last, "more_body": False})
            else:
                raise  # the stream breaks off: only streams of responses have an error event


class _Body:
    """The body of a client's request."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_read = asyncio.Event()

    async def piece(self) -> BodyPiece:
        """Read the next piece. Raises ClientDisconnect."""
        parts: list[bytes] = []
        n_bytes, more = 0, True
        while more and n_bytes < _PIECE_BYTES:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            n_bytes += len(parts[-1])
            more = message.get("more_body", False)
        if not more:
            self._is_read.set()
        return BodyPiece(b"".join(parts), more)

    async def rest(self) -> Message:
        """Receive what follows the body: the client's end."""
        await self._is_read.wait()
        return await self._receive()


class _Sent:
    """The part of an answer that the client has received."""

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


def _lost() -> ApiError:
    return unavailable(
        "the coordinator, which keeps files, batches and jobs, was lost; try again",
        "coordinator_lost",
        2.0,
    )


async def _never() -> Message:
    """A ``receive`` that leaves the body unread."""
    message: Message = await asyncio.get_running_loop().create_future()
    return message


def _is_forwarded(scope: Scope) -> bool:
    path = scope["path"]
    if scope["method"] == "PUT":  # an upload of an adapter, whose reserved name is refused
        return False
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in _FORWARDED)
