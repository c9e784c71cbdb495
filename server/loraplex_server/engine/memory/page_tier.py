"""Brings pages of the prefix cache to files before they are evicted, and back for new requests.

    evicted soon ─ copy, engine thread ─▶ writer thread ─▶ file
    request      ─ keys ─▶ reader thread ─▶ arrived ─ copy, engine thread ─▶ cached page

The engine thread copies a few pages a step and waits for no file.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .copy_stream import CopyBack
from .page_files import PageFiles
from .page_pool import PagePool

_N_READ = 8  # pages of a read
_N_PLACED = 16  # pages of a request that a step takes in at most
_MAX_READS = 8  # reads of a request that wait for the engine thread
_MAX_WRITES = 8  # copies that wait for the writer
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Restore:
    """The pages of one request on their way from files to the cache."""

    keys: Sequence[bytes]
    arrived: deque[tuple[Sequence[bytes], Tensor]] = field(default_factory=deque)
    free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_MAX_READS))
    is_read: bool = False  # nothing more arrives
    is_stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.is_stopped or (self.is_read and not self.arrived)

    def stop(self) -> None:
        self.is_stopped = True
        self.free.release()


class PageTier:
    """Owner of the reader and the writer thread. Engine thread, except for what these run.

    ``storage`` is the cache's memory, uint8 [2, n_layers, n_pages, n_kv_heads, page_size, …].
    """

    def __init__(
        self,
        files: PageFiles,
        pool: PagePool,
        storage: Tensor,
        *,
        n_written: int,  # pages that a step copies for the writer at most
        n_spare: int,  # cached pages have files once fewer pages than these are free
        on_arrival: Callable[[], object],  # wakes the engine thread; called by any thread
    ) -> None:
        self.n_restored = 0  # pages
        self._files, self._pool, self._storage = files, pool, storage
        self._n_written, self._n_spare = n_written, n_spare
        self._on_arrival = on_arrival
        self._restores: dict[str, _Restore] = {}  # by request id
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="loraplex-kv-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loraplex-kv-reader")
        self._writing: set[bytes] = set()
        self._writes = threading.Semaphore(_MAX_WRITES)

    def is_restoring(self, request_id: str, keys: Callable[[], Iterable[bytes]]) -> bool:
        """Return True while pages of the request's prefix are on their way to the cache.

        The first call starts to read them. ``keys``: of the prefix, called once.
        """
        restore = self._restores.get(request_id)
        if restore is None:
            restore = self._restores[request_id] = _Restore(self._missing(keys()))
            if restore.keys:
                self._reader.submit(self._read, restore)
            else:
                restore.is_read = True
        return not restore.is_done

    def forget(self, request_id: str) -> None:
        """Stops what is read for a request that was admitted or ended."""
        restore = self._restores.pop(request_id, None)
        if restore is not None:
            restore.stop()

    def step(self) -> None:
        """Takes in pages that arrived, and starts to write those that are evicted soon."""
        for restore in self._restores.values():
            self._place(restore)
        n_soon = self._n_spare - self._pool.n_free
        if n_soon > 0 and self._writes.acquire(blocking=False):
            unwritten = self._unwritten(self._pool.oldest_cached(n_soon), self._n_written)
            self._write(unwritten)

    def close(self, *, write: bool) -> None:
        """Ends the threads. With ``write`` all cached pages within the limit go to files. Waits.

        The most recently used pages are written last, so their files are deleted last.
        """
        for request_id in list(self._restores):
            self.forget(request_id)
        if write:
            cached = self._pool.oldest_cached(self._pool.n_pages)[-self._files.max_pages :]
            rest = self._unwritten(cached, len(cached))
            for start in range(0, len(rest), self._n_written):
                self._writes.acquire()
                self._write(rest[start : start + self._n_written])
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)

    def _missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return the keys of pages to read: not cached, with files, and without a gap."""
        missing: list[bytes] = []
        n_most = self._pool.n_available // 2
        for key in keys:
            if self._pool.find(key) is not None:
                continue
            if len(missing) == n_most or not self._files.has(key):
                break
            missing.append(key)
        return missing

    def _unwritten(
        self, cached: Iterable[tuple[int, bytes]], n_most: int
    ) -> list[tuple[int, bytes]]:
        rest: list[tuple[int, bytes]] = []
        for page, key in cached:
            if len(rest) == n_most:
                break
            if key not in self._writing and not self._files.has(key):
                rest.append((page, key))
        return rest

    def _write(self, pages: Sequence[tuple[int, bytes]]) -> None:
        """Copies the pages and gives them to the writer. The caller acquired ``_writes``."""
        if not pages:
            self._writes.release()
            return
        keys = [key for _, key in pages]
        index = torch.tensor([page for page, _ in pages], device=self._storage.device)
        copy = CopyBack(self._storage.index_select(2, index).movedim(2, 0).contiguous())
        self._writing.update(keys)

        def write() -> None:
            try:
                for key, page in zip(keys, _bytes_of(copy.wait()), strict=True):
                    self._files.write(key, page)
            except Exception:
                _log.exception("pages of the prefix cache could not be written")
            finally:
                self._writing.difference_update(keys)
                self._writes.release()

        self._writer.submit(write)

    def _place(self, restore: _Restore) -> None:
        """Copies pages that arrived into the cache. Without free pages the restore stops."""
        n_placed = 0
        while restore.arrived and n_placed < _N_PLACED and not restore.is_stopped:
            keys, data = restore.arrived.popleft()
            restore.free.release()
            pages = self._pool.take(len(keys))
            if pages is None:
                restore.stop()
                return
            index = torch.tensor(pages, device=self._storage.device)
            on_device = data.to(self._storage.device, non_blocking=True)
            self._storage.index_copy_(2, index, on_device.movedim(0, 2))
            for page, key in zip(pages, keys, strict=True):
                self._pool.publish(page, key)
                self._pool.release(page)
            n_placed += len(pages)
        self.n_restored += n_placed
        if restore.arrived:
            self._on_arrival()

    def _read(self, restore: _Restore) -> None:
        """Reads pages in order until one is missing. Reader thread."""
        try:
            kinds, n_layers, _, *page_shape = self._storage.shape
            for start in range(0, len(restore.keys), _N_READ):
                restore.free.acquire()
                keys = restore.keys[start : start + _N_READ]
                shape = (len(keys), kinds, n_layers, *page_shape)
                data = torch.empty(shape, dtype=torch.uint8, pin_memory=self._storage.is_cuda)
                n_read = 0
                for key, page in zip(keys, _bytes_of(data), strict=True):
                    if restore.is_stopped or not self._files.read(key, page):
                        break
                    n_read += 1
                if n_read:
                    restore.arrived.append((keys[:n_read], data[:n_read]))
                    self._on_arrival()
                if n_read < len(keys):
                    return
        except Exception:
            _log.exception("pages of the prefix cache could not be read")
        finally:
            restore.is_read = True
            self._on_arrival()


def _bytes_of(pages: Tensor) -> Iterator[memoryview]:
    """Yield the memory of each page of a uint8 tensor on the host."""
    for page in pages:
        yield memoryview(page.view(-1).numpy())
