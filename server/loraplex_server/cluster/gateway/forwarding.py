"""Requests that gateways forward to the coordinator.

Files, batches, jobs and stored responses live in the memory or the folder of one process. The next
request of a client may reach another gateway, so gateways forward such requests, whole.

    client ── gateway ── ForwardedRequest ──▶ answer_forwarded ── the coordinator's application
                            ◀── ASGI messages of the answer ──
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
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


class ForwardedRequest(NamedTuple):
    """An HTTP request that crosses processes."""

    fields: dict[str, object]  # of the ASGI scope
    client: tuple[str, int] | None
    body: bytes


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
    app: ASGIApp, request: ForwardedRequest
) -> AsyncGenerator[list[Message]]:
    """Yield the ASGI messages of the answer as they come. Closing early cancels the request."""
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
            batch, messages[:] = list(messages), []
            if batch:
                yield batch
        await answering  # raises the application's error
    finally:
        left.set()
        await asyncio.wait([answering], timeout=1.0)
        answering.cancel()


class _Forwarding:
    """An ASGI application that forwards each request and relays the answer.

    The body is read into memory, so the headers are checked first.
    """

    def __init__(self, coordinator: DeploymentHandle, auth: Auth) -> None:
        self._coordinator = coordinator.options(stream=True, method_name="answer")
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _Sent()

        async def relay() -> None:
            async for messages in response:
                for message in messages:
                    sent.count(message)
                    await send(message)

        try:
            if await self._auth.may_send_body(scope):
                body = await Request(scope, receive).body()
            else:
                body, receive = b"", _never
            fields = {name: scope[name] for name in _FIELDS}
            request = ForwardedRequest(fields, scope.get("client"), body)
            response = self._coordinator.remote(request)
            await unless_client_leaves(relay(), receive)
        except ClientDisconnect:  # before the body's end
            return
        except ClientLeft:
            response.cancel()
        except (ApiError, RayError, RayServeException) as error:
            answer = error if isinstance(error, ApiError) else _lost()
            if not sent.started:
                await ORJSONResponse.of_error(answer, scope["path"])(scope, receive, send)
            elif sent.is_stream and not sent.ended and scope["path"] == _RESPONSES:
                body = EventWriter(sent.n_events).error(answer)
                await send({"type": "http.response.body", "body": body, "more_body": False})
            else:
                raise  # the stream breaks off: only streams of responses have an error event


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
    if scope["method"] == "PUT":  # an upload as large as an adapter; its reserved name is refused
        return False
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in _FORWARDED)
