"""Names and contents in memory: which name has which content, which contents have no name.

A *composite* (a mixture, a library) has no name; it lives as long as all its parts are named.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .errors import UnknownAdapter
from .name_record import Content, NameRecord, Put
from .names import tenant_of

__all__ = ["NameIndex", "Removed", "Unnamed"]


class Removed(NamedTuple):
    content: Content | None  # None for a composite
    composites: tuple[str, ...]  # digests that had it as a part


class Unnamed(NamedTuple):
    """What a removed name pointed at."""

    digest: str
    has_other_names: bool  # the content stays
    kept: tuple[str, ...]  # digests of its older revisions


class NameIndex:
    """Mirror of the registry. Thread-safe; no method waits or does I/O."""

    def __init__(
        self,
        names: Iterable[NameRecord],
        kept: Iterable[NameRecord],  # newest first
        contents: Iterable[Content],
    ) -> None:
        self._lock = threading.Lock()
        self._names = {record.name: record for record in names}
        self._kept: dict[str, tuple[NameRecord, ...]] = {}
        for record in kept:
            self._kept[record.name] = (*self._kept.get(record.name, ()), record)
        self._contents = {content.digest: content for content in contents}
        # names that have a digest as their current or a kept revision
        self._n_names = Counter(record.digest for record in self._names.values())
        self._n_names.update(old.digest for revisions in self._kept.values() for old in revisions)
        self._composites: dict[str, tuple[str, ...]] = {}

    def find(
        self, name: str, digest_prefix: str | None = None
    ) -> tuple[NameRecord, Content] | None:
        """The current revision of ``name``, or the newest one whose digest begins so."""
        with self._lock:
            record = self._names.get(name)
            if record is None:
                return None
            for revision in (record, *self._kept.get(name, ())):
                if revision.digest.startswith(digest_prefix or ""):
                    return revision, self._contents[revision.digest]
            return None

    def current(self, name: str) -> tuple[NameRecord, Content]:
        """Raises UnknownAdapter, which names the closest."""
        found = self.find(name)
        if found is not None:
            return found
        with self._lock:
            seen = {"", tenant_of(name)}
            names = [other for other in self._names if tenant_of(other) in seen]
        raise UnknownAdapter(name, difflib.get_close_matches(name, names, 5, 0.5), len(names))

    def revisions(self, name: str) -> list[tuple[NameRecord, Content]]:
        """The current one, then the kept ones, newest first. Raises UnknownAdapter."""
        self.current(name)
        with self._lock:
            current = self._names.get(name)
            records = () if current is None else (current, *self._kept.get(name, ()))
            return [(record, self._contents[record.digest]) for record in records]

    def has(self, name: str) -> bool:
        with self._lock:
            return name in self._names

    def of_tenant(self, tenant: str) -> dict[str, tuple[NameRecord, ...]]:
        """The revisions of each of its names: the current one, then the kept ones."""
        with self._lock:
            return {
                name: (record, *self._kept.get(name, ()))
                for name, record in self._names.items()
                if tenant_of(name) == tenant
            }

    def pairs(self) -> list[tuple[NameRecord, Content]]:
        with self._lock:
            return [(record, self._contents[record.digest]) for record in self._names.values()]

    def contents(self) -> list[Content]:
        with self._lock:
            return list(self._contents.values())

    def content(self, digest: str) -> Content | None:
        with self._lock:
            return self._contents.get(digest)

    def point(
        self, put: Put, content: Content, kept_contents: Iterable[Content] = ()
    ) -> tuple[str, ...]:
        """Applies ``put``, which points a name at ``content``; the digests that it let go.

        ``kept_contents``: of the kept revisions, where others may have put them.
        """
        name = put.record.name
        with self._lock:
            before = self._digests(name)
            self._names[name] = put.record
            self._kept[name] = put.kept
            for each in (*kept_contents, content):
                self._contents[each.digest] = each
            after = self._digests(name)
            self._n_names.update(after)
            self._n_names.subtract(before)
            return tuple(digest for digest in before if digest not in after)

    def update(self, record: NameRecord) -> None:
        """The same revision with another pin or expiry."""
        with self._lock:
            self._names[record.name] = record

    def remove_name(self, name: str) -> Unnamed:
        with self._lock:
            digests = self._digests(name)
            del self._names[name]
            self._kept.pop(name, None)
            self._n_names.subtract(digests)
            return Unnamed(digests[0], self._n_names[digests[0]] > 0, digests[1:])

    def add_unnamed(self, content: Content) -> None:
        """A content that no name has: it goes with its last use."""
        with self._lock:
            self._contents.setdefault(content.digest, content)

    def add_composite(self, digest: str, parts: Sequence[str]) -> None:
        with self._lock:
            self._composites[digest] = tuple(parts)

    def composites(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._composites)

    def remove_composite(self, digest: str, *, is_used: Callable[[], bool]) -> bool:
        """Forgets one unless it is used, asked as in ``remove_unreachable``."""
        with self._lock:
            return not is_used() and self._composites.pop(digest, None) is not None

    def knows(self, digest: str) -> bool:
        """A content or a composite that was not retired."""
        with self._lock:
            return digest in self._contents or digest in self._composites

    def is_reachable(self, digest: str) -> bool:
        """Whether a name, or all the names of a composite's parts, lead to it."""
        with self._lock:
            return self._is_reachable(digest)

    def remove_unreachable(
        self, digest: str, *, is_used: Callable[[], bool] = lambda: False
    ) -> Removed | None:
        """Forgets a content or composite that nothing reaches; None if something does, or gone.

        ``is_used`` is asked in the same step: who counts a use, and finds the content here after
        that, keeps it.
        """
        with self._lock:
            if self._is_reachable(digest) or is_used():
                return None
            content = self._contents.pop(digest, None)
            was_composite = self._composites.pop(digest, None) is not None
            if content is None and not was_composite:
                return None
            del self._n_names[digest]
            found = (whole for whole, parts in self._composites.items() if digest in parts)
            return Removed(content, tuple(found))

    def pinned_digests(self) -> frozenset[str]:
        with self._lock:
            return frozenset(r.digest for r in self._names.values() if r.pinned)

    def pinned_as(self, name: str) -> str | None:
        """A pinned name of the content that ``name`` has now: itself, if it is one."""
        with self._lock:
            record = self._names.get(name)
            if record is None or record.pinned:
                return None if record is None else name
            others = self._names.values()
            return next((r.name for r in others if r.pinned and r.digest == record.digest), None)

    def is_named(self, digest: str) -> bool:
        with self._lock:
            return self._n_names[digest] > 0

    def next_expiry(self) -> float | None:
        with self._lock:
            times = [r.expires for r in self._names.values() if r.expires is not None]
        return min(times, default=None)

    def expired(self, now: float) -> list[NameRecord]:
        with self._lock:
            records = self._names.values()
            return [r for r in records if r.expires is not None and r.expires <= now]

    def _digests(self, name: str) -> tuple[str, ...]:
        """Of the current revision, then of the kept ones; all are different."""
        record = self._names.get(name)
        kept = tuple(old.digest for old in self._kept.get(name, ()))
        return kept if record is None else (record.digest, *kept)

    def _is_reachable(self, digest: str) -> bool:
        parts = self._composites.get(digest, (digest,))
        return all(self._n_names[part] > 0 for part in parts)
