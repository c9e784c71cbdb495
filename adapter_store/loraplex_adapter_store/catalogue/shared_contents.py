"""The catalogue's contents as one server uses them: uploads, downloads, load reports and a cache.

The cache is on this server's disk. A content is fetched when it is used, and evicted when the disk
is full. It appears complete and verified, or not at all.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapter_store.errors import CatalogueUnavailable, HostTierFull, RevisionConflict
from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.names.name_state import NameState
from loraplex_adapter_store.report import LoadReport
from loraplex_adapter_store.store_state import StoreState

from .content_objects import ContentMissing, ContentObjects
from .freshness import Freshness
from .name_log import GRACE_S

_MAX_REPORTS = 1024
_log = logging.getLogger(__name__)


class SharedContents:
    """Owner of this server's uploads without a name, and of load reports in memory. Thread-safe."""

    def __init__(self, objects: ContentObjects, freshness: Freshness) -> None:
        self._objects = objects
        self._freshness = freshness
        self._lock = threading.Lock()
        self._reports: dict[str, LoadReport] = {}  # by digest
        self._offered: dict[str, float] = {}  # uploads without a name, and since when

    def offer(self, content: Content, report: LoadReport, folder: Path, tenant: str) -> Content:
        """Upload a content for which a name is to be set. Return the content with its upload."""
        with self._freshness.asking(even_if_down=True):
            stored = self._objects.put(folder, content, report, tenant)
        with self._lock:
            self._offered[stored.upload] = self._freshness.now()
        return stored

    def withdraw(self, content: Content) -> None:
        """Forget the offer, after which an upload without a name is garbage."""
        with self._lock:
            self._offered.pop(content.upload, None)

    def usable(self, content: Content, state: NameState) -> Content:
        """Return ``content`` if it was just offered, else the name's own upload of the content.

        Each name has uploads of its own, and an upload without a name may be garbage. Raises
        RevisionConflict, or CatalogueUnavailable for an old offer.
        """
        since = self._offered.get(content.upload)
        if since is not None:
            if self._freshness.now() - since > GRACE_S / 2:
                raise CatalogueUnavailable(
                    "the upload took too long to get its name; send it again"
                )
            return content
        for revision in state.revisions:
            if revision.content.digest == content.digest:
                return revision.content
        raise RevisionConflict(
            f"adapter {state.name!r} no longer keeps {content.digest[:12]}", state.record
        )

    def find(self, digest: str) -> Content | None:
        """Find a content that no name has, but that the catalogue may still have."""
        with self._freshness.asking():
            manifest = self._objects.find(digest)
        return None if manifest is None else manifest.content

    def fetch(
        self,
        content: Content,
        write: Callable[[str, Iterator[bytes]], Path],
        cancelled: threading.Event | None,
    ) -> None:
        """Fetch and verify the files of a content. See ``ContentObjects.fetch``."""
        with self._freshness.asking(even_if_down=True):
            try:
                report = self._objects.fetch(content, write, cancelled)
            except ContentMissing:  # deleted with its name; another name may have an upload
                report = self._objects.fetch(self._copy(content), write, cancelled)
        self.remember(content.digest, report)

    def report(self, content: Content) -> LoadReport:
        """Raises ContentMissing if the catalogue no longer has the content."""
        report = self._reports.get(content.digest)
        if report is None:
            with self._freshness.asking():
                try:
                    report = self._objects.manifest(content.digest, content.upload).report
                except ContentMissing:
                    copy = self._copy(content)
                    report = self._objects.manifest(copy.digest, copy.upload).report
            self.remember(content.digest, report)
        return report

    def remember(self, digest: str, report: LoadReport) -> None:
        with self._lock:
            self._reports.pop(digest, None)
            self._reports[digest] = report
            if len(self._reports) > _MAX_REPORTS:
                del self._reports[next(iter(self._reports))]

    def forget(self, digest: str) -> None:
        """Forget the report in memory. The catalogue keeps the content."""
        with self._lock:
            self._reports.pop(digest, None)

    def _copy(self, content: Content) -> Content:
        """Find another upload of the same content. Raises ContentMissing."""
        manifest = self._objects.find(content.digest, content.plan_sha256)
        if manifest is None:
            raise ContentMissing(content.digest)
        return manifest.content


class LocalContents:
    """The local copies of contents. Thread-safe.

    Fetches run on the calling thread, one at a time for each digest.
    """

    def __init__(self, shared: SharedContents, state: StoreState, n_bytes: int) -> None:
        """``n_bytes``: capacity for contents and their packed forms together."""
        self.shared = shared
        self._files, self._packed, self._tier = state.files, state.packed, state.tier
        self._writing = state.writing
        self._n_bytes = n_bytes
        self._lock = threading.Lock()  # for the two fields below
        self._flights: dict[str, tuple[threading.Lock, int]] = {}  # with its users
        # Least recently touched first.
        self._used = dict.fromkeys(self._files.digests())

    def ensure(self, content: Content, cancelled: threading.Event | None = None) -> None:
        """Bring the files of ``content`` to the disk. The caller must hold the digest.

        Raises what ``ContentObjects.fetch`` raises, or HostTierFull if the disk is full of contents
        in use.
        """
        self.touch(content.digest)
        if self._files.path(content.digest).exists():
            return
        with self._flight(content.digest):
            if not self._files.path(content.digest).exists():
                self._fetch(content, cancelled)

    def fetch_again(self, content: Content, cancelled: threading.Event | None = None) -> None:
        """Replace files that are damaged, or folded by another version."""
        with self._flight(content.digest):
            with self._writing:
                self._files.remove(content.digest)
            self._fetch(content, cancelled)

    def touch(self, digest: str) -> None:
        """Mark the content as used last. Takes a microsecond."""
        with self._lock:
            self._used.pop(digest, None)
            self._used[digest] = None

    def make_room(self, n_bytes: int = 0) -> None:
        """Evict the least recently used contents until ``n_bytes`` more fit.

        Raises HostTierFull if the rest is in use.
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
            self.shared.fetch(content, write, cancelled)
            with self._writing:
                self._files.publish(staged, content.digest)
        finally:
            self._files.discard(staged)
        _log.debug("adapter %s was fetched from the catalogue", content.digest[:12])

    def _local(self) -> list[str]:
        """Return the digests on the disk, least recently used first."""
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
