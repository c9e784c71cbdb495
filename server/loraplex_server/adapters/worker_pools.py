"""Thread pools for blocking calls, grouped by duration: quick calls never wait for slow ones.

The tenants share each pool fairly. A deletion that waits for running requests or for the device
holds no thread.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_server.tenant_shares import TenantThreads, lower_priority

_T = TypeVar("_T")


class WorkerPools:
    """The pools of the process."""

    def __init__(self) -> None:
        # cards and listings: at most a short disk read
        self.reads = TenantThreads("reads", 3, 2)
        self.catalogue = TenantThreads("catalogue", 16, 8)  # reads that may wait for a bucket
        self.loads = TenantThreads("loads", 16, 8)  # from disk to host memory; may wait for memory
        # checks and writes of uploads, deletions
        self.changes = TenantThreads("changes", 4, 3, initializer=_take_idle_cores)
        self.jobs = TenantThreads("jobs", 8, 4)  # downloads, warm-ups
        self.generation = TenantThreads("generation", 1, 1)  # makes one adapter at a time
        self.batches = TenantThreads("batches", 1, 1)  # calls to the store of files and batches
        self.lines = TenantThreads("lines", 2, 1)  # reads of lines of batches
        # decoding and processing of the images of requests
        self.images = TenantThreads("images", 2, 1, initializer=lower_priority)
        self.encoder = one_core("encoder")  # forwards of the sentence encoder for a few texts
        self.routing = one_core("routing")  # fits and reads the index of ``auto``

    def close(self) -> None:
        """Drop the calls that have not started. Running calls continue to their end."""
        for pool in vars(self).values():
            pool.close()


def one_core(name: str) -> TenantThreads:
    """Return one thread that computes with low priority, on one core."""

    return TenantThreads(name, 1, 1, initializer=_leave_cores_to_serving)


def _take_idle_cores() -> None:
    """Let a thread run only where a core has nothing else to do (Linux), so that it stops no step.

    A thread with a low priority still takes whole slices of a core, and a step of the engine waits
    for each of its threads.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    torch.set_num_threads(1)  # of this thread


def _leave_cores_to_serving() -> None:
    lower_priority()
    torch.set_num_threads(1)  # of this thread


async def leased(
    threads: TenantThreads, tenant: str, acquire: Callable[[threading.Event], AdapterLease]
) -> AdapterLease:
    """Run ``acquire`` on a thread and return its lease.

    If the caller is cancelled, the event is set and a lease that still arrives is released.
    """
    cancelled = threading.Event()
    acquiring = await threads.start(tenant, partial(acquire, cancelled))
    try:
        return await asyncio.shield(acquiring)
    except asyncio.CancelledError:
        cancelled.set()
        acquiring.add_done_callback(_release_orphan)
        raise


def _release_orphan(acquiring: asyncio.Future[AdapterLease]) -> None:
    if not acquiring.cancelled() and acquiring.exception() is None:
        acquiring.result().release()


async def result_within(future: Future[_T], timeout_s: float) -> _T | None:
    """Return the result, or None after ``timeout_s``. The future is not cancelled."""
    waiting = asyncio.wrap_future(future)
    done, _ = await asyncio.wait([waiting], timeout=timeout_s)
    return waiting.result() if done else None
