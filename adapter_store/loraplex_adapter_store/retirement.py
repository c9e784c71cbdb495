"""Frees a content in one atomic step once no name has it and no request uses it.

A use is a lease on a plan, or a hold on the files. Who counts a use first and finds the content in
the index after that keeps it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from .card import TierBytes
from .content_files import ContentFiles
from .faults import FaultLog
from .host_tier import HostTier
from .name_index import NameIndex
from .name_registry import NameRegistry
from .packed_files import PackedFiles

__all__ = ["Retirement"]

_log = logging.getLogger(__name__)


class Retirement:
    """Thread-safe. ``writing`` serialises changes of names and files, also the store's own."""

    def __init__(
        self,
        index: NameIndex,
        tier: HostTier,
        files: ContentFiles,
        packed: PackedFiles,
        registry: NameRegistry,
        writing: threading.RLock,
        faults: FaultLog,
    ) -> None:
        self._index = index
        self._tier = tier
        self._files = files
        self._packed = packed
        self._registry = registry
        self._writing = writing
        self._faults = faults
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self._waiting: dict[str, list[Future[TierBytes]]] = {}  # deletions, by digest
        self._janitor = ThreadPoolExecutor(1, thread_name_prefix="adapter-janitor")
        self._closed = False

    def listen(self, listener: Callable[[str], None]) -> None:
        self._listeners = (*self._listeners, listener)

    def wait_for(self, digest: str, freed: Future[TierBytes]) -> None:
        """``freed`` is done when the content is, or is named again. Call it while writing."""
        self._waiting.setdefault(digest, []).append(freed)

    def named_again(self, digest: str) -> None:
        """Nothing goes: who waited for it learns so. Call it while writing."""
        for freed in self._waiting.pop(digest, ()):
            freed.set_result(TierBytes(0, 0))

    def hold(self, digest: str) -> None:
        """Counts a use of the files and the plan, until ``let_go``."""
        self._tier.hold(digest)

    def let_go(self, digest: str) -> None:
        self._tier.let_go(digest)
        self._retire_if_garbage(digest)

    def release(self, digest: str) -> None:
        """Ends a lease on a plan."""
        self._tier.release(digest)
        self._retire_if_garbage(digest)

    def retire(self, digest: str) -> TierBytes:
        """Frees a digest that nothing reaches or uses; does nothing if something does by now."""
        with self._writing:
            removed = self._index.remove_unreachable(
                digest, is_used=lambda: self._tier.n_leases(digest) > 0
            )
            if removed is None:
                if not self._index.knows(digest):  # a plan leased while its content was retired
                    self._tier.drop(digest)
                return TierBytes(0, 0)
            host = self._tier.drop(digest)
            disk = 0
            if removed.content is not None and not self._closed:
                disk = self._remove_files(digest)
            deletions = self._waiting.pop(digest, ())
        for listener in self._listeners:
            listener(digest)
        host += sum(self.retire(composite).host for composite in removed.composites)
        freed = TierBytes(disk, host)
        for waiting in deletions:
            waiting.set_result(freed)
        return freed

    def forget_evicted_composites(self) -> None:
        """Those that are neither in host memory nor in use: clients make ever new ones."""
        for digest in self._index.composites():
            if self._index.remove_composite(digest, is_used=partial(self._tier.has, digest)):
                self._tier.drop(digest)
                for listener in self._listeners:
                    listener(digest)

    def retire_later(self, digest: str) -> None:
        self.later(partial(self.retire, digest))

    def later(self, work: Callable[[], object]) -> None:
        """On the thread of clean-up; dropped once it is closed: the next start sweeps."""
        try:
            self._janitor.submit(self._look_after, work)
        except RuntimeError:
            return

    def sweep(self) -> None:
        """After a crash: files without a row in the registry, and contents that no name reaches."""
        for files in (self._files, self._packed):
            for digest in tuple(files.digests()):
                if not self._index.is_named(digest):
                    files.remove(digest)
        for content in self._index.contents():
            if not self._index.is_named(content.digest):
                self._registry.forget_content(content.digest)
                self._index.remove_unreachable(content.digest)

    def finish(self) -> None:
        """Waits until what is to be freed by now is freed."""
        self._janitor.submit(lambda: None).result()

    def close(self) -> None:
        """Waits for what is to be freed by now; files stay from here on."""
        self._janitor.shutdown(wait=True)
        with self._writing:
            self._closed = True

    def _remove_files(self, digest: str) -> int:
        """The bytes freed. What cannot be removed now goes with the sweep of the next start."""
        n_bytes = 0
        for remove in (self._files.remove, self._packed.remove):
            try:
                n_bytes += remove(digest)
            except OSError as error:
                self._faults.failed("storage", error)
                _log.warning("files of adapter %s cannot be removed: %s", digest[:12], error)
        try:
            self._registry.forget_content(digest)
        except sqlite3.Error as error:  # the registry has reported it
            _log.warning("adapter %s stays in the registry for now: %s", digest[:12], error)
        return n_bytes

    def _look_after(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._faults.failed("storage", error)
            _log.exception("clean-up of the adapter store failed")

    def _retire_if_garbage(self, digest: str) -> None:
        if not self._index.is_reachable(digest):
            self.retire_later(digest)
