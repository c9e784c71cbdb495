"""The catalogue's contents as one server uses them: offered for a name, fetched, told of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from loraplex_adapter_store.errors import CatalogueUnavailable, RevisionConflict
from loraplex_adapter_store.name_record import Content
from loraplex_adapter_store.report import LoadReport

from .content_objects import ContentMissing, ContentObjects
from .freshness import Freshness
from .name_log import GRACE_S
from .name_state import NameState

__all__ = ["SharedContents"]

_MAX_REPORTS = 1024


class SharedContents:
    """Thread-safe. Owner of which uploads have no name yet, and of load reports in memory."""

    def __init__(self, objects: ContentObjects, freshness: Freshness) -> None:
        self._objects = objects
        self._freshness = freshness
        self._lock = threading.Lock()
        self._reports: dict[str, LoadReport] = {}  # by digest
        self._offered: dict[str, float] = {}  # uploads without a name yet, and since when

    def offer(self, content: Content, report: LoadReport, folder: Path, tenant: str) -> Content:
        """Uploads a content that a name is about to get. The content with its upload."""
        with self._freshness.asking(even_if_down=True):
            stored = self._objects.put(folder, content, report, tenant)
        with self._lock:
            self._offered[stored.upload] = self._freshness.now()
        return stored

    def withdraw(self, content: Content) -> None:
        """The content gets no name: what was uploaded goes with the garbage."""
        with self._lock:
            self._offered.pop(content.upload, None)

    def usable(self, content: Content, state: NameState) -> Content:
        """``content`` with the upload that was just offered, else with the one of ``state``.

        The content of another name is an upload of its own, and one that nothing refers to may be
        garbage. Raises RevisionConflict, or CatalogueUnavailable if it was offered too long ago.
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
            f"adapter {state.name!r} has not kept {content.digest[:12]} any more", state.record
        )

    def find(self, digest: str) -> Content | None:
        """A content that no name here has (any more), but the catalogue may still have."""
        with self._freshness.asking():
            manifest = self._objects.find(digest)
        return None if manifest is None else manifest.content

    def fetch(
        self,
        content: Content,
        write: Callable[[str, Iterator[bytes]], Path],
        cancelled: threading.Event | None,
    ) -> None:
        """Brings and verifies the files of a content. See ``ContentObjects.fetch``."""
        with self._freshness.asking(even_if_down=True):
            try:
                report = self._objects.fetch(content, write, cancelled)
            except ContentMissing:  # this copy went with its name; another name's may be there
                report = self._objects.fetch(self._copy(content), write, cancelled)
        self.remember(content.digest, report)

    def report(self, content: Content) -> LoadReport:
        """Raises ContentMissing where the catalogue has it no more."""
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
        """What this server remembers: the catalogue's contents are for all."""
        with self._lock:
            self._reports.pop(digest, None)

    def _copy(self, content: Content) -> Content:
        """Another upload of the same content. Raises ContentMissing."""
        found = self._objects.find(content.digest, content.plan_sha256)
        if found is None:
            raise ContentMissing(content.digest)
        return found.content
