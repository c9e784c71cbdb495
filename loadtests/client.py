"""The two clients of the load tests: one times streamed tokens, one calls the admin API.

`StreamingClient` reads server-sent events from `http.client` and takes the time where the bytes
arrive. It works in threads and in gevent's greenlets, and takes less CPU for a token than a client
library would: the load generator shares the machine with the server.
"""

import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

_TIMEOUT_S = 600.0
_IDLE_S = 20.0  # servers close connections that are idle for longer


def admin_client(url: str, api_key: str | None = None) -> httpx.Client:
    """Return a client for adapters, models and metrics."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S)


@dataclass(slots=True)
class Outcome:
    """The outcome of one request. Times are seconds since it was sent."""

    sent_at: float  # time.perf_counter()
    status: int = 0  # 0: the connection failed
    retry_after: str | None = None
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)  # between tokens: ITL
    e2e_s: float = 0.0
    n_tokens: int = 0
    n_cached: int = 0  # prompt tokens from the prefix cache
    error: str | None = None  # of an answer that is neither complete nor a proper refusal

    @property
    def refused(self) -> bool:
        """True for a 429 or 503 with Retry-After, which an overloaded server sends."""
        return self.status in (429, 503) and self.retry_after is not None

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 with fewer than two."""
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0


class StreamingClient:
    """A client that streams chat completions and keeps idle connections for the next request.

    Several threads or greenlets may share one client; each request has a connection of its own.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._connection_type = (
            http.client.HTTPSConnection if secure else http.client.HTTPConnection
        )
        self._address = parts.hostname or "127.0.0.1", parts.port or (443 if secure else 80)
        self._path = f"{parts.path.rstrip('/')}/v1/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []  # since when, which

    def stream(self, body: Mapping[str, Any]) -> Outcome:
        """Send one request. Errors of server and network are in ``Outcome.error``."""
        outcome = Outcome(time.perf_counter())
        connection, is_idle = self._take()
        try:
            try:
                response = self._post(connection, body)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                if not is_idle:
                    raise
                connection.close()  # the server closed it after the last answer, as it may
                connection = self._connect()
                response = self._post(connection, body)
            outcome.status = response.status
            if response.status == 200:
                _read_events(response, outcome)
                response.read()  # else an answer with Content-Length keeps the connection busy
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

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    def _post(
        self, connection: http.client.HTTPConnection, body: Mapping[str, Any]
    ) -> http.client.HTTPResponse:
        connection.request("POST", self._path, orjson.dumps(body), self._headers)
        return connection.getresponse()

    def _take(self) -> tuple[http.client.HTTPConnection, bool]:
        """Return an idle connection and True, or a new one and False."""
        while self._idle:
            since, connection = self._idle.pop()
            if time.perf_counter() - since < _IDLE_S:
                return connection, True
            connection.close()
        return self._connect(), False

    def _connect(self) -> http.client.HTTPConnection:
        return self._connection_type(*self._address, timeout=_TIMEOUT_S)


def _read_events(response: http.client.HTTPResponse, outcome: Outcome) -> None:
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
        if any(_has_output(choice) for choice in event.get("choices") or ()):
            if last is None:
                outcome.ttft_s = now - outcome.sent_at
            else:
                outcome.gaps_s.append(now - last)
            last = now
    if outcome.error is None and not done:
        outcome.error = "the stream ended without [DONE]"


def _has_output(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or choice.get("text") or choice.get("finish_reason"))
