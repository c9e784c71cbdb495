"""Changes of names: pointed at a content, rolled back, edited, pinned, expired, deleted.

Each goes to the registry first, which decides, then to the index; what no name reaches any more is
retired. With a catalogue a change is judged by what the catalogue says now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .card import AdapterCard, CardEdit, TierBytes
from .cards import Cards
from .deletion import Deletion
from .errors import InvalidSelector, RevisionConflict, UnknownAdapter
from .host_tier import HostTier
from .name_index import NameIndex
from .name_record import Content, Put, check_match
from .name_refresh import NameRefresh
from .name_registry import NameRegistry
from .names import tenant_of
from .pins import Pins
from .put_options import PutOptions
from .quota import Quota
from .report import LoadReport
from .retirement import Retirement

__all__ = ["NameChanges"]


class NameChanges:
    """Thread-safe: one change of a name at a time, on the calling thread."""

    def __init__(
        self,
        index: NameIndex,
        registry: NameRegistry,
        tier: HostTier,
        retirement: Retirement,
        refresh: NameRefresh,
        cards: Cards,
        pins: Pins,
        writing: threading.RLock,
        check_open: Callable[[], None],
        n_kept_revisions: int,
    ) -> None:
        """``writing`` serialises changes of the index and of files, also those of others.

        ``check_open`` raises once the store is closed.
        """
        self._index = index
        self._registry = registry
        self._tier = tier
        self._retirement = retirement
        self._refresh = refresh
        self._cards = cards
        self._pins = pins
        self._writing = writing
        self._check_open = check_open
        self._n_kept_revisions = n_kept_revisions
        self._lock = threading.RLock()  # serialises changes of names; taken before ``writing``

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """One change at a time, and none of this name from the catalogue meanwhile."""
        with self._lock, self._refresh.held(name):
            self._check_open()
            yield

    @contextmanager
    def changing_with_quota(self, name: str, options: PutOptions) -> Iterator[None]:
        """``changing``, by what the catalogue says now of all names that the quota counts."""
        with self._lock:
            self._refresh.refresh_before_put(name, options)
            with self.changing(name):
                yield

    def check_put(self, name: str, content: Content, options: PutOptions) -> None:
        """Raises RevisionConflict or QuotaExceeded where the put would, as far as is known."""
        found = self._index.find(name)
        current = None if found is None else found[0]
        check_match(name, current, options.if_match, options.replace)
        self._check_quota(name, content.digest, content.disk_bytes, options.quota)

    def point(self, name: str, content: Content, report: LoadReport, options: PutOptions) -> Put:
        """Moves the name; call it within ``changing``. Raises RevisionConflict."""
        put = self._registry.put(name, content, report, options, n_kept=self._n_kept_revisions)
        with self._writing:
            let_go = self._index.point(put, content)
            self._pins.apply()
            self._retirement.named_again(content.digest)
        for digest in let_go:
            self._retirement.retire_later(digest)
        return put

    def rollback(self, name: str, digest_prefix: str | None, if_match: str | None) -> AdapterCard:
        """See ``AdapterStore.rollback``."""
        with self.changing(name):
            self._refresh.refresh(name)
            (current, _), *kept = self._index.revisions(name)
            wanted = next(
                (pair for pair in kept if pair[0].digest.startswith(digest_prefix or "")), None
            )
            if wanted is None:
                shown = ", ".join(record.digest[:12] for record, _ in kept) or "none"
                asked = (
                    f"a revision with digest {digest_prefix}…" if digest_prefix else "a revision"
                )
                raise InvalidSelector(
                    f"adapter {name!r} has not kept {asked} beside the current one; kept: {shown}"
                )
            record, content = wanted
            report = self._registry.report(content)
            options = PutOptions(
                if_match=if_match,
                description=record.description,
                examples=record.examples,
                provenance=record.provenance,
                expires=current.expires,  # of the name, whatever it points at
                defaults=record.defaults,
            )
            put = self.point(name, content, report, options)
        return self._cards.of_put(put, content, report)

    def edit(
        self, name: str, change: Callable[[AdapterCard], CardEdit], if_match: str | None
    ) -> AdapterCard:
        """See ``AdapterStore.edit``."""
        with self.changing(name):
            while True:
                self._refresh.refresh(name)
                card = self._cards.get(name)
                edit = change(card)
                try:
                    record = self._registry.edit(name, edit, if_match=if_match or card.etag)
                except RevisionConflict:  # another server was faster
                    if if_match is not None:
                        raise
                    continue
                self._index.update(record)
                return self._cards.get(name)

    def set_expiry(self, name: str, expires: float | None) -> None:
        with self.changing(name):
            self._index.update(self._registry.set_expiry(name, expires))

    def set_pinned(self, name: str, *, pinned: bool, quota: Quota) -> None:
        """Raises UnknownAdapter or QuotaExceeded."""
        with self._lock:
            if quota.max_pins is not None:
                self._refresh.refresh_tenant(name)
                names = self._index.of_tenant(tenant_of(name))
                pins = {other for other, (current, *_) in names.items() if current.pinned}
                quota.check_pins(len({*pins, name}))
            with self.changing(name):
                self._index.update(self._registry.set_pinned(name, pinned=pinned))
                self._pins.apply()

    def expire(self, now: float) -> tuple[str, ...]:
        """Deletes the names whose time has come."""
        expired = []
        for record in self._index.expired(now):
            with suppress(UnknownAdapter):  # another server was faster, or its life began anew
                self.delete(record.name, expired_by=now)
                expired.append(record.name)
        return tuple(expired)

    def delete(
        self, name: str, *, if_match: str | None = None, expired_by: float | None = None
    ) -> Deletion:
        """``expired_by``: only if it expires by then. Raises UnknownAdapter, RevisionConflict."""
        with self.changing(name):
            self._refresh.refresh(name)
            self._index.current(name)  # an unknown name is told with its neighbours
            self._registry.remove_name(name, if_match, expired_by=expired_by)
            with self._writing:
                digest = self._index.current(name)[0].digest
                removed = self._index.remove_name(name)
                self._pins.apply()
                deletion = Deletion(name, digest, self._tier.n_leases(digest))
                if removed.has_other_names:
                    deletion.freed.set_result(TierBytes(0, 0))
                else:
                    self._retirement.wait_for(digest, deletion.freed)
        for kept in removed.kept:
            self._retirement.retire_later(kept)
        self._retirement.retire(digest)  # nothing while it is leased
        return deletion

    def _check_quota(self, name: str, digest: str, n_bytes: int, quota: Quota) -> None:
        """Raises QuotaExceeded if ``name`` may not point at this content."""
        if quota.max_adapters is None and quota.max_bytes is None:
            return
        names = self._index.of_tenant(tenant_of(name))
        before = [old.digest for old in names.pop(name, ())]
        quota.check_adapters(len(names) + 1)
        kept = [old for old in before if old != digest][: self._n_kept_revisions]
        digests = {record.digest for revisions in names.values() for record in revisions}
        contents = (self._index.content(other) for other in {*digests, *kept} - {digest})
        quota.check_bytes(n_bytes + sum(c.disk_bytes for c in contents if c is not None))
