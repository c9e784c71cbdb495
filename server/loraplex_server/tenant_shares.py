"""Shares of what the tenants of a server use together: permits, and threads that need a permit.

A permit that becomes free goes to the waiting tenant that holds the fewest. Among those, the tenant
whose last permit is the oldest goes first. So a tenant's next call waits for the running calls and
for one call of each other tenant, however many calls the others have sent.
"""

import asyncio
import contextlib
import itertools
import os
import sys
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .errors import too_many

_MAX_WAITING = 512  # calls of a tenant
_NICE = 5  # added by threads with low priority
_T = TypeVar("_T")


class TenantShares:
    """Permits for the calls that may run at once. Event loop only."""

    def __init__(
        self, name: str, n_permits: int, n_of_tenant: int, *, max_waiting: int = _MAX_WAITING
    ) -> None:
        """``name`` is the plural of a call in errors. ``n_of_tenant``: permits of one tenant."""
        self._name, self._n_of_tenant, self._max_waiting = name, n_of_tenant, max_waiting
        self._n_free = n_permits
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._turns = itertools.count(1)
        self._last_turn: dict[str, int] = {}  # by tenant

    def check_room(self, tenant: str) -> None:
        """Raises ApiError (429) if the tenant's queue is full."""
        n_waiting = len(self._waiting.get(tenant, ()))
        if n_waiting >= self._max_waiting:
            raise too_many(
                f"{n_waiting} {self._name} of this tenant wait for their turn, which is the most; "
                "send fewer at once",
                "queue_full",
                1.0,
            )

    async def acquire(self, tenant: str) -> None:
        """Wait for a permit. Raises ApiError (429) if the tenant's queue is full."""
        self.check_room(tenant)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the permit came at the same time
                self.release(tenant)
            elif turn in self._waiting.get(tenant, ()):
                self._leave(tenant, turn)
            raise

    def release(self, tenant: str) -> None:
        self._held[tenant] -= 1
        self._n_free += 1
        self._give()

    def _give(self) -> None:
        while self._n_free and (tenant := self._next()) is not None:
            turn = self._waiting[tenant][0]
            self._leave(tenant, turn)
            if turn.cancelled():
                continue
            self._n_free -= 1
            self._held[tenant] += 1
            self._last_turn[tenant] = next(self._turns)
            turn.set_result(None)

    def _next(self) -> str | None:
        """Return the tenant that gets the next permit."""
        allowed = [one for one in self._waiting if self._held[one] < self._n_of_tenant]
        order = self._last_turn
        return min(allowed, key=lambda one: (self._held[one], order.get(one, 0)), default=None)

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        self._waiting[tenant].remove(turn)
        if not self._waiting[tenant]:
            del self._waiting[tenant]


class TenantThreads:
    """Threads for blocking calls, started with the first call. Event loop only."""

    def __init__(
        self,
        name: str,
        n_threads: int,
        n_of_tenant: int,
        *,
        initializer: Callable[[], object] | None = None,
    ) -> None:
        """``n_of_tenant``: most threads of one tenant. Each thread calls ``initializer`` first."""
        self._shares = TenantShares(f"calls for {name}", n_threads, n_of_tenant)
        self._pool = ThreadPoolExecutor(n_threads, f"loraplex-{name}", initializer)
        self.check_room = self._shares.check_room

    async def run(self, tenant: str | None, work: Callable[[], _T]) -> _T:
        """Return the result of ``work``, which a thread runs. None is the operator.

        Raises ApiError (429) if the tenant's queue is full.
        """
        return await (await self.start(tenant, work))

    async def start(self, tenant: str | None, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Return the future of ``work`` once it has a thread. See ``run``."""
        tenant = tenant or ""
        await self._shares.acquire(tenant)
        loop = asyncio.get_running_loop()

        def release(_: Future[_T]) -> None:  # called on the thread, once it is free
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._shares.release, tenant)

        try:
            future = self._pool.submit(work)
        except RuntimeError:  # closed: the call is dropped like those that wait
            self._shares.release(tenant)
            raise asyncio.CancelledError from None
        future.add_done_callback(release)
        return asyncio.wrap_future(future)

    def close(self, *, wait: bool = False) -> None:
        """Drop the calls that have not started. Running calls continue to their end."""
        self._pool.shutdown(wait=wait, cancel_futures=True)


def lower_priority() -> None:
    """Lets the engine's threads go before the calling thread, where the system can (Linux)."""
    if sys.platform == "linux":
        os.nice(_NICE)  # of the thread; on other systems, of the process
