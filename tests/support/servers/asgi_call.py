"""Drives an ASGI app message by message, with clients that send slowly or leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message


class AsgiCall:
    """A request to ``app`` whose answer is read piece by piece, unlike with httpx's transport."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        *,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        spec_version: str = "2.3",
    ) -> None:
        self._app = app
        self._body = b"" if body is None else json.dumps(body).encode()
        given = {"host": "127.0.0.1", "content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in given.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        self._raises_when_gone = spec_version >= "2.4"
        self._left = asyncio.Event()
        self._sent_body = False
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.n_messages = 0

    async def __aenter__(self) -> AsgiCall:
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        await asyncio.wait_for(self._task, 5)

    async def next_body(self) -> bytes:
        """Return the next piece of the answer, b"" at its end."""
        while True:
            message = await asyncio.wait_for(self._messages.get(), 5)
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            elif message.get("body") or not message.get("more_body"):
                return bytes(message.get("body", b""))

    async def rest(self) -> bytes:
        pieces = []
        while piece := await self.next_body():
            pieces.append(piece)
            if not self._task.done():
                continue
            if self._messages.empty():
                break
        return b"".join(pieces)

    async def leave(self) -> None:
        """Disconnect the client and wait until the app has ended."""
        self._left.set()
        await asyncio.wait_for(asyncio.wait([self._task]), 5)

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def _receive(self) -> Message:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._left.is_set() and self._raises_when_gone:
            raise OSError("the client left")
        self.n_messages += 1
        await self._messages.put(message)


def events_of(stream: bytes) -> list[Any]:
    """Return the JSON of each data event, ``[DONE]`` as a string, without comments."""
    events: list[Any] = []
    for block in stream.decode().split("\n\n"):
        if block.startswith("data: "):
            text = block.removeprefix("data: ")
            events.append(text if text == "[DONE]" else json.loads(text))
        else:
            assert not block or block.startswith(":"), block
    return events
