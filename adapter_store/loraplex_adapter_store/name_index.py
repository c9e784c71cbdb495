"""Names and contents in memory: who points at what, and what nothing points at any more.

A *composite* (a mixture, a library) has no name; it lives as long as all its parts are named.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .errors import UnknownAdapter
from .registry import Content, NameRecord

__all__ = ["NameIndex", "Removed"]


class Removed(NamedTuple):
    content: Content | None  # None for a composite
    composites: tuple[str, ...]  # digests that had it as a part


class NameIndex:
    """Mirror of the catalogue. Thread-safe; no method waits or does I/O."""

    def __init__(self, names: Iterable[NameRecord], contents: Iterable[Content]) -> None:
        self._lock = threading.Lock()
        self._names = {record.name: record for record in names}
        self._contents = {content.digest: content for content in contents}
        self._n_names = Counter(record.digest for record in self._names.values())
        self._composites: dict[str, tuple[str, ...]] = {}
        self._awaited: Counter[str] = Counter()

    def find(self, name: str) -> tuple[NameRecord, Content] | None:
        with self._lock:
            record = self._names.get(name)
            return None if record is None else (record, self._contents[record.digest])

    def current(self, name: str) -> tuple[NameRecord, Content]:
        """Raises UnknownAdapter, which names the closest."""
        found = self.find(name)
        if found is not None:
            return found
        with self._lock:
            names = list(self._names)
        raise UnknownAdapter(name, difflib.get_close_matches(name, names, 5, 0.5), len(names))

    def pairs(self) -> list[tuple[NameRecord, Content]]:
        with self._lock:
            return [(record, self._contents[record.digest]) for record in self._names.values()]

    def contents(self) -> list[Content]:
        with self._lock:
            return list(self._contents.values())

    def content(self, digest: str) -> Content | None:
        with self._lock:
            return self._contents.get(digest)

    def point(self, record: NameRecord, content: Content) -> str | None:
        """``record.name`` now means ``content``; returns the digest it meant before."""
        with self._lock:
            old = self._names.get(record.name)
            self._names[record.name] = record
            self._contents[content.digest] = content
            self._n_names[content.digest] += 1
            if old is None:
                return None
            self._n_names[old.digest] -= 1
            return old.digest

    def remove_name(self, name: str) -> bool:
        """True if the content has other names. Else it waits for ``end_wait`` to be retired."""
        with self._lock:
            digest = self._names.pop(name).digest
            self._n_names[digest] -= 1
            if self._n_names[digest] > 0:
                return True
            self._awaited[digest] += 1
            return False

    def end_wait(self, digest: str) -> None:
        with self._lock:
            self._awaited[digest] -= 1
            if self._awaited[digest] <= 0:
                del self._awaited[digest]

    def add_composite(self, digest: str, parts: Sequence[str]) -> None:
        with self._lock:
            self._composites[digest] = tuple(parts)

    def is_garbage(self, digest: str) -> bool:
        """Nothing reaches it and nobody waits to retire it himself."""
        with self._lock:
            return not self._is_reachable(digest) and self._awaited[digest] <= 0

    def remove_unreachable(self, digest: str) -> Removed | None:
        """Forgets a content or composite that nothing reaches; None if something does, or gone."""
        with self._lock:
            if self._is_reachable(digest):
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

    def is_named(self, digest: str) -> bool:
        with self._lock:
            return self._n_names[digest] > 0

    def _is_reachable(self, digest: str) -> bool:
        parts = self._composites.get(digest, (digest,))
        return all(self._n_names[part] > 0 for part in parts)
