"""A tenant's waiting requests, and the virtual token counters of the tenant and its adapters."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import chain

from loraplex_server.engine.requests.client import TenantShare, TenantStats
from loraplex_server.engine.requests.request import Request

_N_IDLE_ADAPTERS = 256  # adapters whose counters are kept before idle ones are pruned


class Admission(Enum):
    """The scheduler's answer for a waiting request."""

    ADMITTED = "admitted"
    LOADING = "loading"  # the adapter is being loaded: try other requests
    NO_ADAPTER_SLOT = "no adapter slot"  # running requests hold the pool: try other requests
    NO_ROOM = "no room"  # no KV pages or row: no other request may go first
    NO_SHARE = "no share"  # the tenant's part of the step is used up: try other tenants
    FAILED = "failed"  # it ends with an error: remove it


class AdapterQueue:
    """A tenant's waiting requests for one adapter, first come first served."""

    __slots__ = ("counter", "n_running", "requests", "tenant")

    def __init__(self, tenant: TenantQueue) -> None:
        self.tenant = tenant
        self.counter = 0.0
        self.n_running = 0
        self.requests: deque[tuple[int, Request]] = deque()  # with their numbers of arrival

    def charge(self, cost: float) -> None:
        """Adds served tokens to the counters of the adapter and, by weight, of the tenant."""
        self.counter += cost
        self.tenant.counter += cost / self.tenant.share.weight


class TenantQueue:
    """Offers the tenant's preempted requests first, then requests of the least served adapter.

    Requests without an adapter slot may be bypassed by others of their tenant, ``max_bypass``
    times. After that no other request of the tenant is admitted first, so slots become free.
    """

    def __init__(self, share: TenantShare, *, max_bypass: int) -> None:
        self.share = share
        self.counter = 0.0  # tokens served by weight, see ``wait_queue``
        self.debt_s = 0.0  # seconds of steps beyond the tenant's share, see ``step_budget``
        self.n_running = 0
        self.n_waiting = 0
        self.n_admitted = 0
        self.n_steps_queued = 0  # sum over the admitted requests
        self._max_bypass = max_bypass
        self._adapters: dict[str, AdapterQueue] = {}
        self._last_left: AdapterQueue | None = None  # the last queue to become empty
        self._resumed: list[Request] = []  # preempted; oldest first
        self._prune_at = _N_IDLE_ADAPTERS

    @property
    def stats(self) -> TenantStats:
        return TenantStats(
            self.share.tenant, self.n_running, self.n_waiting, self.n_admitted, self.n_steps_queued
        )

    @property
    def rows_by_weight(self) -> float:
        return self.n_running / self.share.weight

    @property
    def may_run_more(self) -> bool:
        limit = self.share.max_running
        return limit is None or self.n_running < limit

    def push(self, request: Request, number: int) -> AdapterQueue:
        """Queues a new request. A returning adapter's counter rises to the lowest waiting one."""
        queue = self._adapters.get(request.adapter_digest)
        if queue is None:
            if len(self._adapters) >= self._prune_at:
                self._prune()
            queue = self._adapters[request.adapter_digest] = AdapterQueue(self)
        if not queue.requests:
            queue.counter = max(queue.counter, self._least_counter())
        queue.requests.append((number, request))
        self.n_waiting += 1
        return queue

    def push_front(self, request: Request) -> None:
        """Queues a preempted request before the tenant's others, by age."""
        self._resumed.append(request)
        self._resumed.sort(key=lambda r: r.submitted_at)
        self.n_waiting += 1

    def remove(self, request: Request, queue: AdapterQueue) -> None:
        """Removes a cancelled request; does nothing if it has been removed."""
        if request in self._resumed:
            self._resumed.remove(request)
            self.n_waiting -= 1
            return
        for item in queue.requests:
            if item[1] is request:
                queue.requests.remove(item)
                self._left(queue)
                return

    def offers(self, try_admit: Callable[[Request], Admission]) -> Iterator[Admission]:
        """Yield ADMITTED for each admission. The last answer may be NO_ROOM or NO_ADAPTER_SLOT."""
        while self._resumed:
            answer = try_admit(self._resumed[0])
            if answer not in (Admission.ADMITTED, Admission.FAILED):
                yield answer
                return
            self._resumed.pop(0)
            self.n_waiting -= 1
            if answer is Admission.ADMITTED:
                yield answer
        heads = self._heads()
        heapq.heapify(heads)
        bypassed: list[Request] = []
        while heads and not any(other.n_bypassed >= self._max_bypass for other in bypassed):
            queue = heapq.heappop(heads)[2]
            request = queue.requests[0][1]
            answer = try_admit(request)
            if answer in (Admission.NO_ROOM, Admission.NO_SHARE):
                yield answer
                return
            if answer is Admission.NO_ADAPTER_SLOT:
                bypassed.append(request)
            if answer not in (Admission.ADMITTED, Admission.FAILED):
                continue
            queue.requests.popleft()
            self._left(queue)
            if queue.requests:
                heapq.heappush(heads, (queue.counter, queue.requests[0][0], queue))
            if answer is Admission.ADMITTED:
                for other in bypassed:
                    other.n_bypassed += 1
                yield answer
        if bypassed:
            yield Admission.NO_ADAPTER_SLOT

    def upcoming(self, n: int) -> list[Request]:
        """Return the next requests, one for each adapter."""
        heads = heapq.nsmallest(n, self._heads())
        return (self._resumed + [queue.requests[0][1] for _, _, queue in heads])[:n]

    def __iter__(self) -> Iterator[Request]:
        yield from self._resumed
        for _, request in chain.from_iterable(q.requests for q in self._adapters.values()):
            yield request

    def _heads(self) -> list[tuple[float, int, AdapterQueue]]:
        return [(q.counter, q.requests[0][0], q) for q in self._adapters.values() if q.requests]

    def _left(self, queue: AdapterQueue) -> None:
        self.n_waiting -= 1
        if not queue.requests:
            self._last_left = queue

    def _least_counter(self) -> float:
        waiting = [queue.counter for queue in self._adapters.values() if queue.requests]
        if waiting:
            return min(waiting)
        return 0.0 if self._last_left is None else self._last_left.counter

    def _prune(self) -> None:
        """Forget idle adapters whose counters are at most the least of the waiting adapters.

        Such an adapter starts at that least counter when it returns, so nothing is lost.
        """
        least = self._least_counter()
        self._adapters = {
            digest: queue
            for digest, queue in self._adapters.items()
            if queue.requests or queue.n_running or queue.counter > least
        }
        self._prune_at = 2 * len(self._adapters) + _N_IDLE_ADAPTERS
