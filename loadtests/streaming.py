"""One streamed chat completion over a plain socket, timed where the bytes arrive.

Needs no locust, and works under gevent's patches as without. A client library would spend more
time on a token than the server does.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

__all__ = ["Connections", "Outcome"]

_TIMEOUT_S = 300.0
_IDLE_S = 20.0  # servers close connections that lie idle for long


@dataclass(slots=True)
class Outcome:
    """``status`` 0: the connection failed. Times in seconds since the request was sent."""

    sent_at: float  # time.perf_counter()
    status: int = 0
    retry_after: str | None = None
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    n_tokens: int = 0
    n_cached: int = 0
    error: str | None = None  # of an answer that is neither complete nor a proper refusal

    @property
    def refused(self) -> bool:
        """Told to come back later, as an overloaded server should."""
        return self.status in (429, 503) and self.retry_after is not None


class Connections:
    """Keeps idle connections for the next request. One greenlet or thread uses one at a time."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []  # since when, which

    def stream(self, body: Mapping[str, Any], path: str = "/v1/chat/completions") -> Outcome:
        """Never raises for what the server or the network does."""
        outcome = Outcome(time.perf_counter())
        connection = self._take()
        try:
            connection.request("POST", path, orjson.dumps(body), self._headers)
            response = connection.getresponse()
            outcome.status = response.status
            if response.status == 200:
                _read(response, outcome)
            else:
                outcome.retry_after = response.getheader("retry-after")
                text = response.read()[:300].decode(errors="replace")
                if not outcome.refused:
                    outcome.error = f"{response.status}: {text}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome.error = repr(error)[:300]
            connection.close()
        else:
            self._idle.append((time.perf_counter(), connection))
        outcome.e2e_s = time.perf_counter() - outcome.sent_at
        return outcome

    def send(
        self, method: str, path: str, data: bytes | None = None, content_type: str | None = None
    ) -> tuple[int, bytes]:
        """Any other request: status and body. Raises OSError or HTTPException."""
        headers = dict(self._headers)
        if content_type:
            headers["Content-Type"] = content_type
        connection = self._take()
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            found = response.status, response.read()
        except BaseException:
            connection.close()
            raise
        self._idle.append((time.perf_counter(), connection))
        return found

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    def _take(self) -> http.client.HTTPConnection:
        while self._idle:
            since, connection = self._idle.pop()
            if time.perf_counter() - since < _IDLE_S:
                return connection
            connection.close()
        return http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)


def _read(response: http.client.HTTPResponse, outcome: Outcome) -> None:
    last: float | None = None
    done = False
    while line := response.readline():
        if not line.startswith(b"data: "):
            continue
        now = time.perf_counter()
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        event = orjson.loads(line[6:])
        if "error" in event:
            outcome.error = str(event["error"].get("message"))[:300]
        if usage := event.get("usage"):
            outcome.n_tokens = usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            outcome.n_cached = details.get("cached_tokens") or 0
        if any(_says_something(choice) for choice in event.get("choices") or ()):
            if last is None:
                outcome.ttft_s = now - outcome.sent_at
            else:
                outcome.gaps_s.append(now - last)
            last = now
    if outcome.error is None and not done:
        outcome.error = "the stream ended without [DONE]"


def _says_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or choice.get("text") or choice.get("finish_reason"))
