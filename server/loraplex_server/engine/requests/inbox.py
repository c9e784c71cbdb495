"""Holds what other threads ask of the engine thread, and the ids of open requests."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from loraplex_server.engine.errors import EngineDraining, EngineError, QueueFull

from .request import Request

_N_RECENT = 64  # finished requests that the rate is estimated from
_MAX_RETRY_AFTER_S = 60.0


class Unload(NamedTuple):
    """Unload an idle adapter from the device, and answer with the freed bytes."""

    digest: str
    freed: Future[int]

    def answer(self, n_bytes: int) -> None:
        if self.freed.set_running_or_notify_cancel():
            self.freed.set_result(n_bytes)


Message = Request | Unload | Callable[[], object]  # a function is called by the engine thread


class Inbox:
    """A thread-safe queue of messages. Only ``get`` waits. It is closed when its reader ends.

    Every accepted message is either read or returned by ``close``: none is lost.
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
        """The error for new messages once the engine thread has ended, else None."""
        return self._closed

    @property
    def n_requests(self) -> int:
        """The number of submitted requests that have not ended."""
        return len(self._request_ids)

    def n_queued(self, tenant: str) -> int:
        """Return how many submitted requests of the tenant are not admitted yet."""
        return self._n_queued.get(tenant, 0)

    def submit(self, request: Request) -> None:
        """Queues the request. Raises as ``EngineClient.submit``; then the request is not queued."""
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
            self._messages.put(request)

    def post(self, message: Message) -> bool:
        """Queues a message. Return False if the engine thread has ended."""
        with self._lock:
            if self._closed is None:
                self._messages.put(message)
            return self._closed is None

    def get(self, timeout_s: float) -> Message | None:
        """Return the next message, or None after ``timeout_s``. Engine thread."""
        try:
            return self._messages.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None

    def admitted(self, requests: Sequence[Request]) -> None:
        """Counts requests as no longer waiting. Engine thread."""
        with self._lock:
            self._n_queued.subtract(request.source.share.tenant for request in requests)

    def ended(self, request: Request) -> None:
        """Frees the request's id. Engine thread."""
        with self._lock:
            self._request_ids.discard(request.id)
            if request.admitted_at is None:
                self._n_queued[request.source.share.tenant] -= 1
            self._finished_at = [*self._finished_at[1 - _N_RECENT :], time.monotonic()]

    def drain(self) -> None:
        """Refuses requests from now on."""
        with self._lock:
            self._is_draining = True

    def close(self, error: EngineError) -> list[Message]:
        """Return the unread messages and accept no more. ``submit`` raises ``error``."""
        with self._lock:
            self._closed = error
            self._request_ids.clear()
        unread = []
        while (message := self.get(0)) is not None:
            unread.append(message)
        return unread

    def _retry_after_s(self, limit: int) -> float:
        """Return how long the queue takes to shrink by a tenth at the recent rate, 1 s at least."""
        recent = self._finished_at
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 1.0
        rate = (len(recent) - 1) / (recent[-1] - recent[0])
        return min(_MAX_RETRY_AFTER_S, max(1.0, 0.1 * limit / rate))
