"""Messages from other threads to the engine thread, and the requests that have not ended."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence

from .errors import EngineDraining, EngineError, QueueFull
from .messages import Message, Submit
from .request import Request

__all__ = ["Inbox"]

_N_RECENT = 64  # finished requests that the pace is taken from
_MAX_RETRY_AFTER_S = 60.0


class Inbox:
    """Thread-safe; no method but ``get`` waits. Closed once and for good when its reader ends.

    Every message that was accepted is either read or returned by ``close``: none is lost.
    """

    def __init__(self, *, max_queue: int) -> None:
        self._max_queue = max_queue
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards all that follows
        self._request_ids: set[str] = set()
        self._n_queued: Counter[str] = Counter()  # by tenant
        self._is_draining = False
        self._closed: EngineError | None = None
        self._finished_at: list[float] = []

    @property
    def closed(self) -> EngineError | None:
        """The error for new messages once the engine thread has ended; None before."""
        return self._closed

    @property
    def n_requests(self) -> int:
        """Submitted and not ended."""
        return len(self._request_ids)

    def n_queued(self, tenant: str) -> int:
        """Submitted and not admitted."""
        return self._n_queued.get(tenant, 0)

    def submit(self, request: Request) -> None:
        """Raises what ``EngineClient.submit`` says; then the request was not taken."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if self._is_draining:
                raise EngineDraining("the server is shutting down; send the request elsewhere")
            share = request.source.share
            limit = share.max_queued or self._max_queue
            if self._n_queued[share.tenant] >= limit:
                whose = "of this API key's tenant " if share.tenant else ""
                raise QueueFull(
                    f"{limit} requests {whose}are waiting, which is the limit; "
                    "try again later, or raise --max-queue or the key's max_queued",
                    self._retry_after_s(limit),
                )
            if request.id in self._request_ids:
                raise EngineError(f"request id {request.id!r} is already running")
            self._request_ids.add(request.id)
            self._n_queued[share.tenant] += 1
            self._messages.put(Submit(request))

    def post(self, message: Message) -> bool:
        """False if the engine thread has ended: the message is not delivered."""
        with self._lock:
            if self._closed is None:
                self._messages.put(message)
            return self._closed is None

    def get(self, timeout_s: float) -> Message | None:
        """The next message; waits for one at most ``timeout_s``. Engine thread."""
        try:
            return self._messages.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None

    def admitted(self, requests: Sequence[Request]) -> None:
        """They have left the queue. Engine thread."""
        with self._lock:
            self._n_queued.subtract(request.source.share.tenant for request in requests)

    def ended(self, request: Request) -> None:
        """Its id is free again. Engine thread."""
        with self._lock:
            self._request_ids.discard(request.id)
            if request.admitted_at is None:
                self._n_queued[request.source.share.tenant] -= 1
            self._finished_at = [*self._finished_at[1 - _N_RECENT :], time.monotonic()]

    def drain(self) -> None:
        """From now on no request is taken."""
        with self._lock:
            self._is_draining = True

    def close(self, error: EngineError) -> list[Message]:
        """Takes nothing any more; returns what was not read. ``submit`` raises ``error``."""
        with self._lock:
            self._closed = error
            self._request_ids.clear()
        left = []
        while (message := self.get(0)) is not None:
            left.append(message)
        return left

    def _retry_after_s(self, limit: int) -> float:
        """At the recent pace, for a queue of ``limit`` to shrink by a tenth; at least a second."""
        recent = self._finished_at
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 1.0
        pace = (len(recent) - 1) / (recent[-1] - recent[0])
        return min(_MAX_RETRY_AFTER_S, max(1.0, 0.1 * limit / pace))
