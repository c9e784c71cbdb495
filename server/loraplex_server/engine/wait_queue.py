"""Who is admitted next: fair across adapters, first come first served within one.

Start-time fair queueing: each request gets a tag, ``max(now, last tag of its adapter) + cost``,
with cost = prompt tokens + max_tokens; the lowest tag goes first. An adapter that floods the queue
pushes its own tags into the future, not the others'. With A adapters waiting, a request is
overtaken by at most one request of each other adapter per request of its own adapter before it
(up to differences in cost).

A request whose adapter has no place on the device may be bypassed, ``max_bypass`` times at most;
then nobody is admitted before it, and places free up as running requests end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from enum import Enum

from .request import Request

__all__ = ["Admission", "WaitQueue"]


class Admission(Enum):
    """What the scheduler says of a candidate."""

    ADMITTED = "admitted"
    LOADING = "loading"  # its adapter is being loaded to the device: try others meanwhile
    NO_ADAPTER_PLACE = "no adapter place"  # the pool is held by running requests: try others
    NO_ROOM = "no room"  # no KV pages or batch place: no other request may go first
    FAILED = "failed"  # finished with an error; take it out


class WaitQueue:
    """Owner of the waiting requests. Engine thread only."""

    def __init__(self, *, max_bypass: int) -> None:
        self._max_bypass = max_bypass
        self._heap: list[tuple[float, int, Request]] = []
        self._resumed: list[Request] = []  # preempted; oldest first, they go before all others
        self._last_tag: dict[str, float] = {}
        self._virtual_time = 0.0
        self._n_pushed = 0

    def __len__(self) -> int:
        return len(self._heap) + len(self._resumed)

    def push(self, request: Request) -> None:
        """Queues a new request."""
        adapter = request.adapter_digest
        tag = max(self._virtual_time, self._last_tag.get(adapter, 0.0)) + _cost(request)
        self._last_tag[adapter] = tag
        self._n_pushed += 1
        heapq.heappush(self._heap, (tag, self._n_pushed, request))

    def push_front(self, request: Request) -> None:
        """Queues a preempted request before all others, by age."""
        self._resumed.append(request)
        self._resumed.sort(key=lambda r: r.submitted_at)

    def remove(self, request: Request) -> None:
        """Takes out a request that was cancelled while it waited."""
        if request in self._resumed:
            self._resumed.remove(request)
            return
        self._heap = [item for item in self._heap if item[2] is not request]
        heapq.heapify(self._heap)

    def admit(self, try_admit: Callable[[Request], Admission]) -> None:
        """Offers requests in order until the scheduler has no room or nobody is left."""
        if not self._admit_resumed(try_admit):
            return
        skipped: list[tuple[float, int, Request]] = []
        bypassed: list[Request] = []
        while self._heap:
            item = heapq.heappop(self._heap)
            tag, _, request = item
            answer = try_admit(request)
            if answer is Admission.ADMITTED:
                self._virtual_time = max(self._virtual_time, tag - _cost(request))
                for other in bypassed:
                    other.n_bypassed += 1
            elif answer in (Admission.NO_ADAPTER_PLACE, Admission.LOADING):
                skipped.append(item)
                if answer is Admission.NO_ADAPTER_PLACE:
                    bypassed.append(request)
            elif answer is Admission.NO_ROOM:
                heapq.heappush(self._heap, item)
                break
            if any(other.n_bypassed >= self._max_bypass for other in bypassed):
                break
        for item in skipped:
            heapq.heappush(self._heap, item)
        if not self._heap:
            self._last_tag.clear()

    def upcoming(self, n: int) -> list[Request]:
        """The next ``n`` requests in order, for adapter prefetch."""
        nearest = heapq.nsmallest(n, self._heap)
        return (self._resumed + [request for _, _, request in nearest])[:n]

    def __iter__(self) -> Iterator[Request]:
        yield from self._resumed
        for _, _, request in self._heap:
            yield request

    def _admit_resumed(self, try_admit: Callable[[Request], Admission]) -> bool:
        """False if a preempted request found no room: then no other is admitted."""
        while self._resumed:
            answer = try_admit(self._resumed[0])
            if answer not in (Admission.ADMITTED, Admission.FAILED):
                return False
            self._resumed.pop(0)
        return True


def _cost(request: Request) -> int:
    return request.n_tokens + request.source.sampling.max_tokens
