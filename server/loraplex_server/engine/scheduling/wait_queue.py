"""The order of admissions and of fairness preemptions: fair across tenants, in tokens served.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a
tenant's counter grows by the tokens served to it, divided by its weight. A prompt token counts one
(none if the prefix cache had it), an answer token two; each as much again for every
``_CONTEXT_TOKENS`` before it, which attention reads. The tenant with the lowest counter goes
first. A returning tenant's counter rises to the lowest waiting one, so nobody saves up. The same
holds for the adapters of a tenant. Without API keys there is one tenant.

A tenant without a running row goes before all others, and preempts a row of the tenant that has the
most by weight. Take T tenants, at least T rows, and KV pages and adapter slots for one request of
each. Then a tenant's next request waits at most T steps for its first row once its adapter is
resident, however many requests the others sent. With more tenants, and between two tenants that
flood, a row changes hands when its tenant is ``QUANTUM`` ahead. docs/fairness.md has the proof.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest

from loraplex_server.engine.requests.client import TenantStats
from loraplex_server.engine.requests.request import Request

from .tenant_queue import AdapterQueue, Admission, TenantQueue

QUANTUM = 256.0  # lead of a counter from which another tenant may preempt a row
_OUTPUT_TOKEN = 2  # cost of an answer token, in prompt tokens
_CONTEXT_TOKENS = 1024  # tokens that cost as much to attend to as a token costs without them


class WaitQueue:
    """Owner of the waiting requests and of the counters. Engine thread only."""

    def __init__(self, *, max_bypass: int) -> None:
        self._max_bypass = max_bypass
        self._tenants: dict[
            str, TenantQueue
        ] = {}  # all tenants ever seen: at most the number of keys
        self._queue_of: dict[str, AdapterQueue] = {}  # by request id, until it ends
        self._last_left: TenantQueue | None = None  # the last tenant whose queue became empty
        self._n_pushed = 0

    def __len__(self) -> int:
        return sum(tenant.n_waiting for tenant in self._tenants.values())

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self._tenants.values())

    @property
    def is_shared(self) -> bool:
        """Return True if there are several tenants."""
        return len(self._tenants) > 1

    def counter(self, request: Request) -> float:
        """Return the counter of the request's tenant."""
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
        """Counts a request that got a row.

        ``n_new``: prompt tokens to compute for the first time; 0 only after a preemption.
        """
        queue = self._queue_of[request.id]
        queue.n_running += 1
        queue.tenant.n_running += 1
        queue.charge(_cost(n_new, request.n_prompt))
        if n_new:
            queue.tenant.n_admitted += 1
            queue.tenant.n_steps_queued += request.n_steps_queued

    def served(self, requests: Iterable[Request]) -> None:
        """Charges the new tokens of the requests' answers."""
        for request in requests:
            n_output = len(request.token_ids) - request.n_prompt
            n_new = n_output - request.n_charged
            if n_new > 0:
                cost = _OUTPUT_TOKEN * _cost(n_new, len(request.token_ids))
                self._queue_of[request.id].charge(cost)
                request.n_charged = n_output

    def ended(self, request: Request, *, ran: bool) -> None:
        """Removes a request for good. ``ran``: True if it had a row."""
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
        """Offers requests in order until the scheduler has no room or no request is left."""
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
            elif answer is Admission.NO_ADAPTER_SLOT and not tenant.n_running:
                return  # the next free slot is for this tenant

    def to_yield(self, request: Request) -> Iterator[tuple[TenantQueue, bool]]:
        """Yield the tenants that should lose a row to this waiting request, in order.

        The flag is True for a tenant far ahead, which may lose its last row, too.
        """
        taker = self.tenant_of(request)
        others = [t for t in self._tenants.values() if t.n_running and t is not taker]
        for other in sorted(others, key=lambda t: (t.rows_by_weight, t.counter), reverse=True):
            is_ahead = other.counter - taker.counter >= QUANTUM
            after = (
                taker.n_running + 1
            ) / taker.share.weight  # rows by weight, once the request runs
            if taker.n_running:
                yields = is_ahead and (other.n_running - 1) / other.share.weight >= after
            else:
                yields = is_ahead or other.n_running > 1
            if yields:
                yield other, is_ahead

    def to_preempt(self) -> TenantQueue:
        """Return the tenant to preempt when running requests need pages."""
        running = [tenant for tenant in self._tenants.values() if tenant.n_running]
        return max(running, key=lambda t: (t.rows_by_weight, t.counter))

    def upcoming(self, n: int) -> list[Request]:
        """Return the next requests in order, one for each adapter of a tenant, for prefetching."""
        waiting = [t for t in self._tenants.values() if t.n_waiting and t.may_run_more]
        in_turns = zip_longest(*(t.upcoming(n) for t in sorted(waiting, key=_rank)))
        return [request for turn in in_turns for request in turn if request is not None][:n]

    def heads(self) -> list[Request]:
        """Return the next request of each tenant that may get another row."""
        waiting = [t for t in self._tenants.values() if t.n_waiting and t.may_run_more]
        return [tenant.upcoming(1)[0] for tenant in waiting]

    def stats(self) -> tuple[TenantStats, ...]:
        """Return the statistics of each tenant; empty with a single tenant."""
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


def _cost(n_tokens: int, end: int) -> float:
    """Return the cost of the ``n_tokens`` before position ``end``."""
    return n_tokens * (1 + (end - n_tokens / 2) / _CONTEXT_TOKENS)


def _rank(tenant: TenantQueue) -> tuple[bool, float]:
    return tenant.n_running > 0, tenant.counter
