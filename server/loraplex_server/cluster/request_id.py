"""One ``x-request-id`` in an answer, not two: Ray's middleware around the application adds it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["without_request_id"]

_NAME = b"x-request-id"


def without_request_id(app: ASGIApp) -> ASGIApp:
    """``app`` as it is, whose own header is left out. Ray has told it the id with the request."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name != _NAME]
                message = {**message, "headers": kept}
            await send(message)

        await app(scope, receive, send_on)

    return call
