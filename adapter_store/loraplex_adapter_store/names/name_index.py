"""The names and contents of a store in memory.

A *composite* (a mixture or a library) has no name. It lives as long as all its parts have names.
"""

import difflib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from loraplex_adapter_store.errors import UnknownAdapter

from .name_record import Content, NameRecord
from .name_state import NameState, Revision
from .name_syntax import tenant_of


class Removed(NamedTuple):
    content: Content | None  # None for a composite
    composites: tuple[str, ...]  # digests of composites that had it as a part


class NameIndex:
    """Mirror of the registry. Thread-safe; no method waits or does I/O."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, NameState] = {}  # of existing names
        self._contents: dict[str, Content] = {}  # by digest
        self._n_names: Counter[str] = Counter()  # current and kept revisions, by digest
        self._n_pins: Counter[str] = Counter()  # pinned names, by digest
        self._composites: dict[str, tuple[str, ...]] = {}

    def apply(self, state: NameState) -> tuple[str, ...]:
        """Bring a name to ``state``. Return the digests that the name has lost."""
        with self._lock:
            before = self._states.pop(state.name, None)
            old = () if before is None else before.revisions
            if state.revisions:
                self._states[state.name] = state
            self._contents.update((each.content.digest, each.content) for each in state.revisions)
            for revisions, step in ((state.revisions, 1), (old, -1)):
                for each in revisions:
                    self._n_names[each.record.digest] += step
                if revisions and revisions[0].record.pinned:
                    self._n_pins[revisions[0].record.digest] += step
            digests = {each.record.digest for each in state.revisions}
            return tuple(each.record.digest for each in old if each.record.digest not in digests)

    def find(self, name: str, digest_prefix: str | None = None) -> Revision | None:
        """Return the current revision of ``name``, or the newest one with this digest prefix."""
        with self._lock:
            revisions = self._revisions(name)
        matches = (each for each in revisions if each.record.digest.startswith(digest_prefix or ""))
        return next(matches, None)

    def current(self, name: str) -> Revision:
        """Raises UnknownAdapter, which suggests similar names."""
        return self.revisions(name)[0]

    def revisions(self, name: str) -> Sequence[Revision]:
        """Return the current revision, then kept ones, newest first. Raises UnknownAdapter."""
        with self._lock:
            if revisions := self._revisions(name):
                return revisions
            tenants = {"", tenant_of(name)}
            names = [other for other in self._states if tenant_of(other) in tenants]
        folded = {other.casefold(): other for other in names}
        near = difflib.get_close_matches(name.casefold(), folded, 5, 0.5)
        raise UnknownAdapter(name, [folded[other] for other in near], len(names))

    def has(self, name: str) -> bool:
        with self._lock:
            return name in self._states

    def of_tenant(self, tenant: str) -> dict[str, tuple[NameRecord, ...]]:
        """Return the revisions of each of the tenant's names, the current one first."""
        with self._lock:
            states = [s for name, s in self._states.items() if tenant_of(name) == tenant]
        return {state.name: tuple(each.record for each in state.revisions) for state in states}

    def all_current(self) -> list[Revision]:
        with self._lock:
            return [state.revisions[0] for state in self._states.values()]

    def contents(self) -> list[Content]:
        with self._lock:
            return list(self._contents.values())

    def content(self, digest: str) -> Content | None:
        with self._lock:
            return self._contents.get(digest)

    def add_unnamed(self, content: Content) -> None:
        """Add a content without a name. It is removed after its last use."""
        with self._lock:
            self._contents.setdefault(content.digest, content)

    def add_composite(self, digest: str, parts: Sequence[str]) -> None:
        with self._lock:
            self._composites[digest] = tuple(parts)

    def composites(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._composites)

    def remove_composite(self, digest: str, *, is_used: Callable[[], bool]) -> bool:
        """Remove a composite unless it is used; see ``remove_unreachable``."""
        with self._lock:
            return not is_used() and self._composites.pop(digest, None) is not None

    def knows(self, digest: str) -> bool:
        """True for a content or a composite that was not removed."""
        with self._lock:
            return digest in self._contents or digest in self._composites

    def is_reachable(self, digest: str) -> bool:
        """True if a name, or the names of all parts of a composite, lead to the digest."""
        with self._lock:
            return self._is_reachable(digest)

    def remove_unreachable(
        self, digest: str, *, is_used: Callable[[], bool] = lambda: False
    ) -> Removed | None:
        """Remove a content or composite, unless something reaches or uses it.

        ``is_used`` is called in the same atomic step: a caller that counts a use first, and then
        finds the content here, keeps the content.
        """
        with self._lock:
            if self._is_reachable(digest) or is_used():
                return None
            content = self._contents.pop(digest, None)
            was_composite = self._composites.pop(digest, None) is not None
            if content is None and not was_composite:
                return None
            del self._n_names[digest]
            users = (whole for whole, parts in self._composites.items() if digest in parts)
            return Removed(content, tuple(users))

    def pinned_digests(self) -> frozenset[str]:
        with self._lock:
            return frozenset(digest for digest, count in self._n_pins.items() if count)

    def pinned_as(self, name: str) -> str | None:
        """Return a pinned name of the content that ``name`` has now: ``name`` itself, if pinned."""
        with self._lock:
            if not (revisions := self._revisions(name)):
                return None
            record = revisions[0].record
            if record.pinned or not self._n_pins[record.digest]:
                return name if record.pinned else None
            others = (state.revisions[0].record for state in self._states.values())
            return next((r.name for r in others if r.pinned and r.digest == record.digest), None)

    def is_named(self, digest: str) -> bool:
        with self._lock:
            return self._n_names[digest] > 0

    def next_expiry(self) -> float | None:
        """Return the earliest time at which a name expires."""
        times = (each.record.expires for each in self.all_current())
        return min((time for time in times if time is not None), default=None)

    def expired(self, now: float) -> list[NameRecord]:
        records = (each.record for each in self.all_current())
        return [r for r in records if r.expires is not None and r.expires <= now]

    def _revisions(self, name: str) -> Sequence[Revision]:
        state = self._states.get(name)
        return () if state is None else state.revisions

    def _is_reachable(self, digest: str) -> bool:
        parts = self._composites.get(digest, (digest,))
        return all(self._n_names[part] > 0 for part in parts)
