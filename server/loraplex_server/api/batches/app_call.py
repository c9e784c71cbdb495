"""One call of the application from inside, as if a client had sent it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Scope

from loraplex_server.api.request_info import BatchCaller

__all__ = ["Answer", "call_app"]


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


async def call_app(app: ASGIApp, caller: BatchCaller, path: str, body: bytes) -> Answer:
    """POSTs JSON through every middleware. Cancelling it ends the call."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": None,
        "server": None,
    }
    caller.attach(scope)
    unread = [body]
    status, headers = 0, dict[str, str]()
    pieces: list[bytes] = []

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.get_running_loop().create_future()  # this client never leaves
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update((str(k, "latin-1"), str(v, "latin-1")) for k, v in message["headers"])
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return Answer(status, headers, b"".join(pieces))
