"""The contents of a catalogue that are on this server's disk: fetched when asked for, evicted.

The disk is a cache: what is evicted is fetched again. A content appears whole and verified, or not
at all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapter_store.content_files import ContentFiles
from loraplex_adapter_store.errors import HostTierFull
from loraplex_adapter_store.host_tier import HostTier
from loraplex_adapter_store.name_record import Content
from loraplex_adapter_store.packed_files import PackedFiles

from .shared_contents import SharedContents

__all__ = ["LocalContents"]

_log = logging.getLogger(__name__)


class LocalContents:
    """Thread-safe. Fetches run on the calling thread, one at a time for each digest."""

    def __init__(
        self,
        shared: SharedContents,
        files: ContentFiles,
        packed: PackedFiles,
        tier: HostTier,
        writing: threading.RLock,
        n_bytes: int,
    ) -> None:
        """``n_bytes``: of contents and their prepared forms, together."""
        self._shared = shared
        self._files = files
        self._packed = packed
        self._tier = tier
        self._writing = writing  # serialises changes of files, also the store's own
        self._n_bytes = n_bytes
        self._lock = threading.Lock()  # of what follows
        self._flights: dict[str, tuple[threading.Lock, int]] = {}  # with who waits for it
        self._used: dict[str, None] = dict.fromkeys(files.digests())  # least recently touched first

    def ensure(self, content: Content, cancelled: threading.Event | None = None) -> None:
        """The files of ``content`` are on the disk when it returns. Its caller holds the digest.

        Raises what ``ContentObjects.fetch`` raises, or HostTierFull if they cannot fit beside what
        is in use.
        """
        self.touch(content.digest)
        if self._files.path(content.digest).exists():
            return
        with self._flight(content.digest):
            if not self._files.path(content.digest).exists():
                self._fetch(content, cancelled)

    def fetch_again(self, content: Content, cancelled: threading.Event | None = None) -> None:
        """In place of files that are damaged, or were folded otherwise."""
        with self._flight(content.digest):
            with self._writing:
                self._files.remove(content.digest)
            self._fetch(content, cancelled)

    def touch(self, digest: str) -> None:
        """Of what is on the disk now, it is evicted last. Takes a microsecond."""
        with self._lock:
            self._used.pop(digest, None)
            self._used[digest] = None

    def make_room(self, n_bytes: int = 0) -> None:
        """Evicts what was not loaded or uploaded for longest until ``n_bytes`` more fit.

        Raises HostTierFull if they cannot, because the rest is in use.
        """
        with self._writing:
            sizes = {digest: self._size(digest) for digest in self._local()}
            excess = sum(sizes.values()) + n_bytes - self._n_bytes
            for digest, size in sizes.items():
                if excess <= 0:
                    return
                if self._tier.n_leases(digest):
                    continue
                self._files.remove(digest)
                self._packed.remove(digest)
                with self._lock:
                    self._used.pop(digest, None)
                excess -= size
        if excess > 0 and n_bytes:
            raise HostTierFull(
                f"an adapter of {n_bytes} bytes does not fit into the {self._n_bytes} bytes of "
                "disk for adapters of the catalogue, beside those in use; raise "
                "--catalogue-disk"
            )

    def _fetch(self, content: Content, cancelled: threading.Event | None) -> None:
        self.make_room(content.disk_bytes)
        staged = self._files.stage()

        def write(name: str, parts: Iterator[bytes]) -> Path:
            self._files.write(staged / name, parts)
            return staged / name

        try:
            self._shared.fetch(content, write, cancelled)
            with self._writing:
                self._files.publish(staged, content.digest)
        finally:
            self._files.discard(staged)
        _log.debug("adapter %s was fetched from the catalogue", content.digest[:12])

    def _local(self) -> list[str]:
        """The digests on the disk, those not touched for longest first."""
        there = set(self._files.digests())
        with self._lock:
            used = [digest for digest in self._used if digest in there]
        return [*(there - set(used)), *used]

    def _size(self, digest: str) -> int:
        return self._files.n_bytes(self._files.path(digest)) + self._packed.n_bytes(digest)

    @contextmanager
    def _flight(self, digest: str) -> Iterator[None]:
        with self._lock:
            lock, n_waiting = self._flights.get(digest, (threading.Lock(), 0))
            self._flights[digest] = (lock, n_waiting + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, n_waiting = self._flights.pop(digest)
                if n_waiting > 1:
                    self._flights[digest] = (lock, n_waiting - 1)
