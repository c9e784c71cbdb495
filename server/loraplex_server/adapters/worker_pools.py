"""Thread pools for blocking calls, by duration, so that quick calls never wait for slow ones.

A deletion that waits for running requests, or for the device, holds no thread.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor

__all__ = ["WorkerPools"]


class WorkerPools:
    """Threads start with the first work that is given to a pool."""

    def __init__(self) -> None:
        self.reads = _pool(2, "reads")  # cards and listings; at most a short disk read
        self.catalogue = _pool(16, "catalogue")  # reads that may wait for an object store
        self.loads = _pool(8, "loads")  # from disk to host memory; may wait for room there
        self.changes = _pool(4, "changes")  # uploads are checked and written, names removed
        self.jobs = _pool(4, "jobs")  # downloads
        self.generation = _pool(1, "generation")  # adapters are made one at a time
        self.batches = _pool(1, "batches")  # what the store of files and batches blocks for
        self.encoder = _pool(1, "encoder")  # forwards of the sentence encoder, a few texts each

    def close(self) -> None:
        """Drops what has not started; what runs goes on until it is done."""
        quick = (self.reads, self.catalogue, self.loads, self.changes)
        for pool in (*quick, self.jobs, self.generation, self.batches, self.encoder):
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(n_threads: int, name: str) -> Executor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix=f"loraplex-{name}")
