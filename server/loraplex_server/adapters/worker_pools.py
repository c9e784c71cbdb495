"""Thread pools for blocking calls, by duration, so that quick calls never wait for slow ones.

A deletion that waits for running requests, or for the device, holds no thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar
from weakref import WeakValueDictionary

from loraplex_adapter_store.lease import AdapterLease

__all__ = ["TenantShares", "WorkerPools"]

_T = TypeVar("_T")


class TenantShares:
    """Of a pool's threads, so that the work of one tenant never holds all. Event loop only."""

    def __init__(self, pool: Executor, n_threads: int) -> None:
        """``n_threads`` that a tenant may have at a time."""
        self._pool, self._n_threads = pool, n_threads
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, tenant: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """What the pool will have made of ``work``, which begins once the tenant has a thread."""
        places = self._places.get(tenant)
        if places is None:
            places = self._places[tenant] = asyncio.Semaphore(self._n_threads)
        await places.acquire()
        loop = asyncio.get_running_loop()

        def give_back(done: Future[_T]) -> None:  # on the thread: it is free then, not before
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(places.release)

        try:
            made = self._pool.submit(work)
        except BaseException:
            places.release()
            raise
        made.add_done_callback(give_back)
        return asyncio.wrap_future(made)

    async def lease(
        self, tenant: str, acquire: Callable[[threading.Event], AdapterLease]
    ) -> AdapterLease:
        """What ``acquire`` gives, on one of these threads. Where the client leaves meanwhile its
        event is set, and a lease that comes all the same is given back.
        """
        cancelled = threading.Event()
        acquiring = await self.run(tenant, partial(acquire, cancelled))
        try:
            return await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            cancelled.set()
            acquiring.add_done_callback(_release_orphan)
            raise

    def close(self) -> None:
        """Drops what has not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _release_orphan(acquiring: asyncio.Future[AdapterLease]) -> None:
    if not acquiring.cancelled() and acquiring.exception() is None:
        acquiring.result().release()


class WorkerPools:
    """Threads start with the first work that is given to a pool."""

    def __init__(self) -> None:
        self.reads = _pool(2, "reads")  # cards and listings; at most a short disk read
        self.catalogue = _pool(16, "catalogue")  # reads that may wait for an object store
        # from disk to host memory; may wait for room there
        self.loads = TenantShares(_pool(16, "loads"), 8)
        self.changes = _pool(4, "changes")  # uploads are checked and written, names removed
        self.jobs = _pool(4, "jobs")  # downloads
        self.generation = _pool(1, "generation")  # adapters are made one at a time
        self.batches = _pool(1, "batches")  # what the store of files and batches blocks for
        self.encoder = _pool(1, "encoder")  # forwards of the sentence encoder, a few texts each

    def close(self) -> None:
        """Drops what has not started; what runs goes on until it is done."""
        self.loads.close()
        quick = (self.reads, self.catalogue, self.changes)
        for pool in (*quick, self.jobs, self.generation, self.batches, self.encoder):
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(n_threads: int, name: str) -> Executor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"loraplex-{name}")
