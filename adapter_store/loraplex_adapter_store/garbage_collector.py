"""Frees a content in one atomic step once no name points at it and no request uses it.

A use is a lease on a plan, or a hold on the files. A caller counts the use first and then looks the
content up in the index: if the index still has the content, the content stays until the use ends.
"""

import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from .names.card import DeleteReport, TierBytes
from .store_state import StoreState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deletion:
    """A deleted name whose content is freed when the last request that uses it ends."""

    name: str
    digest: str
    n_leases: int  # when the name was removed
    freed: Future[TierBytes] = field(default_factory=Future)  # done when the content is freed

    def report(self, freed: TierBytes | None) -> DeleteReport:
        """Return the report. ``freed`` is None if the content is still in use."""
        n_bytes = freed or TierBytes(0, 0)
        return DeleteReport(self.name, self.digest, freed is not None, self.n_leases, n_bytes)


class GarbageCollector:
    """Frees contents without names, on its own thread. Thread-safe."""

    def __init__(self, state: StoreState) -> None:
        self._index, self._tier, self._registry = state.index, state.tier, state.registry
        self._files, self._packed = state.files, state.packed
        self._writing = state.writing
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self._waiting: dict[str, list[Future[TierBytes]]] = {}  # deletions, by digest
        self._janitor = ThreadPoolExecutor(1, thread_name_prefix="adapter-janitor")
        self._closed = False

    def listen(self, listener: Callable[[str], None]) -> None:
        self._listeners = (*self._listeners, listener)

    def wait_for(self, digest: str, freed: Future[TierBytes]) -> None:
        """Complete ``freed`` when the content is freed or named again. Call it while writing."""
        self._waiting.setdefault(digest, []).append(freed)

    def named_again(self, digest: str) -> None:
        """Complete waiting deletions with zero freed bytes. Call it while writing."""
        for freed in self._waiting.pop(digest, ()):
            freed.set_result(TierBytes(0, 0))

    def hold(self, digest: str) -> None:
        """Count a use of the files and the plan, until ``let_go``."""
        self._tier.hold(digest)

    def let_go(self, digest: str) -> None:
        self._tier.let_go(digest)
        self._retire_if_garbage(digest)

    def release(self, digest: str, *, user: str = "") -> None:
        """End a lease of ``user`` on a plan."""
        self._tier.release(digest, user=user)
        self._retire_if_garbage(digest)

    def retire(self, digest: str) -> TierBytes:
        """Free a content that has no name and no use. Returns the freed bytes."""
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
        """Drop composites that are neither used nor in memory, since their number is unbounded."""
        for digest in self._index.composites():
            if self._index.remove_composite(digest, is_used=partial(self._tier.has, digest)):
                self._tier.drop(digest)
                for listener in self._listeners:
                    listener(digest)

    def retire_later(self, digest: str) -> None:
        self.later(partial(self.retire, digest))

    def later(self, work: Callable[[], object]) -> None:
        """Run ``work`` on the clean-up thread. After ``close`` it is dropped: a start sweeps."""
        with suppress(RuntimeError):
            self._janitor.submit(self._run, work)

    def sweep(self) -> None:
        """Delete files without a name, such as files left by a crash."""
        for files in (self._files, self._packed):
            for digest in tuple(files.digests()):
                if not self._index.is_named(digest):
                    files.remove(digest)

    def finish(self) -> None:
        """Wait until all work that was queued before this call is done."""
        self._janitor.submit(lambda: None).result()

    def close(self) -> None:
        """Finish the queued work. No file is deleted after that."""
        self._janitor.shutdown(wait=True)
        with self._writing:
            self._closed = True

    def _remove_files(self, digest: str) -> int:
        """Return the freed bytes. Files that cannot be removed now are swept at the next start."""
        n_bytes = 0
        for remove in (self._files.remove, self._packed.remove):
            try:
                n_bytes += remove(digest)
            except OSError as error:
                _log.error(
                    "files of adapter %s cannot be removed: %s",
                    digest[:12],
                    error,
                    extra={"part": "storage"},
                )
        try:
            self._registry.forget_content(digest)
        except sqlite3.Error as error:  # the registry has reported it
            _log.warning("adapter %s stays in the registry for now: %s", digest[:12], error)
        return n_bytes

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:
            _log.exception("clean-up of the adapter store failed", extra={"part": "storage"})

    def _retire_if_garbage(self, digest: str) -> None:
        if not self._index.is_reachable(digest):
            self.retire_later(digest)
