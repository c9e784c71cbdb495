"""Who is admitted next, and whose row is taken back: fair across tenants, in tokens served.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a
tenant's counter grows by the tokens served to it, divided by its weight. A token of a prompt counts
one (none if the prefix cache had it), a token of an answer two. The tenant with the lowest counter
goes first; one that comes back is lifted to the lowest counter that waits, so that nobody saves up.
Within a tenant the same holds for its adapters. Without API keys there is one tenant.

A tenant without a running row goes before all others, and room is made for it: rows are taken back
from the tenant that has the most by weight. With T tenants and at least T rows, KV pages and places
of adapters for one request of each, a tenant's next request therefore waits at most T steps for its
first row, however many requests the others sent, once its adapter is on the device. With more
tenants than that, and to even out the rows of tenants that both flood, a row changes hands when its
tenant is ``QUANTUM`` ahead. docs/fairness.md has the proof.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest

from .client import TenantStats
from .request import Request
from .tenant_queue import AdapterQueue, Admission, TenantQueue

__all__ = ["QUANTUM", "WaitQueue"]

QUANTUM = 256.0  # by which a counter must be ahead before another tenant takes its row
_OUTPUT_TOKEN = 2  # a token of an answer, in tokens of a prompt


class WaitQueue:
    """Owner of the waiting requests and of the counters. Engine thread only."""

    def __init__(self, *, max_bypass: int) -> None:
        self._max_bypass = max_bypass
        self._tenants: dict[str, TenantQueue] = {}  # of all that ever came: as many as keys
        self._queue_of: dict[str, AdapterQueue] = {}  # by request id, until it ends
        self._last_left: TenantQueue | None = None  # that had nothing waiting any more
        self._n_pushed = 0

    def __len__(self) -> int:
        return sum(tenant.n_waiting for tenant in self._tenants.values())

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self._tenants.values())

    @property
    def is_shared(self) -> bool:
        """Whether there is more than one tenant to be fair to."""
        return len(self._tenants) > 1

    def counter(self, request: Request) -> float:
        """Of the request's tenant."""
        return self._queue_of[request.id].tenant.counter

    def tenant_of(self, request: Request) -> TenantQueue:
        return self._queue_of[request.id].tenant

    def push(self, request: Request) -> None:
        """Queues a new request."""
        share = request.source.share
        tenant = self._tenants.get(share.tenant)
        if tenant is None:
            tenant = TenantQueue(share, max_bypass=self._max_bypass)
            self._tenants[share.tenant] = tenant
        tenant.share = share
        if not tenant.n_waiting:
            tenant.counter = max(tenant.counter, self._least_counter())
        self._n_pushed += 1
        self._queue_of[request.id] = tenant.push(request, self._n_pushed)

    def push_front(self, request: Request) -> None:
        """Queues a preempted request before the others of its tenant."""
        queue = self._queue_of[request.id]
        queue.n_running -= 1
        queue.tenant.n_running -= 1
        queue.tenant.push_front(request)

    def started(self, request: Request, n_new: int) -> None:
        """It has a row now. ``n_new``: tokens of its prompt to be computed for the first time.

        There is at least one, unless it was preempted before.
        """
        queue = self._queue_of[request.id]
        queue.n_running += 1
        queue.tenant.n_running += 1
        queue.charge(n_new)
        if n_new:
            queue.tenant.n_admitted += 1
            queue.tenant.n_steps_queued += request.n_steps_queued

    def served(self, requests: Iterable[Request]) -> None:
        """Charges what their answers have grown by."""
        for request in requests:
            n_output = len(request.token_ids) - request.n_prompt
            if n_output > request.n_charged:
                self._queue_of[request.id].charge(_OUTPUT_TOKEN * (n_output - request.n_charged))
                request.n_charged = n_output

    def ended(self, request: Request, *, ran: bool) -> None:
        """It runs or waits no more, for good."""
        self.served((request,))
        queue = self._queue_of.pop(request.id)
        if ran:
            queue.n_running -= 1
            queue.tenant.n_running -= 1
        else:
            queue.tenant.remove(request, queue)
            self._left(queue.tenant)

    def admit(
        self, try_admit: Callable[[Request], Admission], *, only_without_row: bool = False
    ) -> None:
        """Offers requests in order until the scheduler has no room or nobody is left."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.n_waiting]
        rounds = [tenant.offers(try_admit) for tenant in waiting]
        order = [(_rank(tenant), index) for index, tenant in enumerate(waiting)]
        heapq.heapify(order)
        while order:
            _, index = heapq.heappop(order)
            tenant = waiting[index]
            if not tenant.may_run_more or (only_without_row and tenant.n_running):
                continue
            answer = next(rounds[index], None)
            self._left(tenant)
            if answer is Admission.ADMITTED:
                heapq.heappush(order, (_rank(tenant), index))
            elif answer is Admission.NO_ROOM:
                return
            elif answer is Admission.NO_ADAPTER_PLACE and not tenant.n_running:
                return  # a place that frees up now is for this tenant

    def to_yield(self, request: Request) -> Iterator[tuple[TenantQueue, bool]]:
        """Tenants that should give up a row so that this waiting request can run, in order.

        The flag says whether one is far ahead, so that it may lose its last row, too.
        """
        taker = self.tenant_of(request)
        others = [t for t in self._tenants.values() if t.n_running and t is not taker]
        for other in sorted(others, key=lambda t: (t.rows_by_weight, t.counter), reverse=True):
            is_ahead = other.counter - taker.counter >= QUANTUM
            after = (taker.n_running + 1) / taker.share.weight  # rows by weight, once it has one
            if taker.n_running:
                yields = is_ahead and (other.n_running - 1) / other.share.weight >= after
            else:
                yields = is_ahead or other.n_running > 1
            if yields:
                yield other, is_ahead

    def to_preempt(self) -> TenantQueue:
        """Whose youngest row goes when running requests need its pages."""
        running = [tenant for tenant in self._tenants.values() if tenant.n_running]
        return max(running, key=lambda t: (t.rows_by_weight, t.counter))

    def upcoming(self, n: int) -> list[Request]:
        """The next requests in order, each adapter of a tenant once: for adapter prefetch."""
        waiting = [t for t in self._tenants.values() if t.n_waiting and t.may_run_more]
        in_turns = zip_longest(*(t.upcoming(n) for t in sorted(waiting, key=_rank)))
        return [request for turn in in_turns for request in turn if request is not None][:n]

    def stats(self) -> tuple[TenantStats, ...]:
        """By tenant, first come first; empty while there is one."""
        if not self.is_shared:
            return ()
        return tuple(tenant.stats for tenant in self._tenants.values())

    def _left(self, tenant: TenantQueue) -> None:
        if not tenant.n_waiting:
            self._last_left = tenant

    def _least_counter(self) -> float:
        waiting = [tenant.counter for tenant in self._tenants.values() if tenant.n_waiting]
        if waiting:
            return min(waiting)
        return 0.0 if self._last_left is None else self._last_left.counter


def _rank(tenant: TenantQueue) -> tuple[bool, float]:
    return tenant.n_running > 0, tenant.counter
