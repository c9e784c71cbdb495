"""Changes of names: pointed at a content, rolled back, edited, pinned, expired, deleted.

The registry decides on a change. Then the change is applied to the index, and contents that no name
reaches any more are retired. Changes by other servers are applied in the same way.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from .cards import Cards
from .errors import InvalidSelector, RevisionConflict, UnknownAdapter
from .garbage_collector import Deletion, GarbageCollector
from .names.card import AdapterCard, CardEdit, TierBytes
from .names.name_record import Content, check_match
from .names.name_state import Change, NameState, Transition
from .names.name_syntax import tenant_of
from .names.put_options import PutOptions, Quota
from .report import LoadReport
from .store_state import StoreState


class NameChanges:
    """Changes names one at a time, on the calling thread, and reports pins. Thread-safe."""

    def __init__(
        self, state: StoreState, garbage: GarbageCollector, cards: Cards, n_kept_revisions: int
    ) -> None:
        self._state = state
        self._index, self._registry = state.index, state.registry
        self._garbage = garbage
        self._cards = cards
        self._n_kept_revisions = n_kept_revisions
        self._pinned: frozenset[str] = frozenset()
        self._listeners: tuple[Callable[[frozenset[str]], None], ...] = ()
        self._lock = threading.RLock()  # for changes of names; taken before ``writing``
        self._other_bytes: Callable[[str], int] = lambda tenant: 0

    def apply(self, name_state: NameState) -> None:
        """Bring the store to this state of a name, which the registry has."""
        with self._state.writing:
            lost = self._index.apply(name_state)
            self._apply_pins()
            for revision in name_state.revisions:
                self._garbage.named_again(revision.content.digest)
        for digest in lost:
            self._garbage.retire_later(digest)

    def listen_to_pins(self, listener: Callable[[frozenset[str]], None]) -> None:
        """Call ``listener`` with the pinned digests, now and after each change of them."""
        with self._state.writing:
            self._listeners = (*self._listeners, listener)
            listener(self._pinned)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Block all other changes, and changes of this name by other servers."""
        with self._lock, self._registry.changing(name):
            self._state.check_open()
            yield

    @contextmanager
    def changing_with_quota(self, name: str, options: PutOptions) -> Iterator[None]:
        """``changing``, after a refresh of all names that the quota counts."""
        with self._lock:
            self.refresh_before_put(name, options)
            with self.changing(name):
                yield

    def refresh_before_put(self, name: str, options: PutOptions) -> None:
        """Read the name, and all names that the quota counts, from a shared catalogue."""
        self._registry.refresh(name)
        if options.quota.max_adapters is not None or options.quota.max_bytes is not None:
            self._registry.refresh_tenant(tenant_of(name))

    def check_put(self, name: str, content: Content, options: PutOptions) -> None:
        """Raises RevisionConflict or QuotaExceeded if the put would fail by the known state."""
        current = self._index.find(name)
        record = None if current is None else current.record
        check_match(name, record, options.if_match, options.replace)
        self._check_quota(name, content.digest, content.disk_bytes, options)

    def count_bytes_of(self, other_bytes: Callable[[str], int]) -> None:
        """See ``AdapterStore.count_bytes_of``."""
        self._other_bytes = other_bytes

    def n_bytes_beside(self, tenant: str, name: str | None) -> int:
        """See ``AdapterStore.n_bytes_beside``."""
        self._registry.refresh_tenant(tenant)
        names = self._index.of_tenant(tenant)
        names.pop(name or "", None)
        digests = {record.digest for revisions in names.values() for record in revisions}
        return self._n_bytes(tenant, digests)

    def point(self, name: str, content: Content, report: LoadReport, options: PutOptions) -> Change:
        """Point the name at ``content``; call it within ``changing``. Raises RevisionConflict."""

        def moved(state: NameState) -> NameState:
            usable = self._registry.usable(content, state)
            return state.put(usable, options, n_kept=self._n_kept(options))

        return self._change(name, moved, report)

    def rollback(self, name: str, digest_prefix: str | None, if_match: str | None) -> AdapterCard:
        """See ``AdapterStore.rollback``."""
        with self.changing(name):
            self._registry.refresh(name)
            current, *retained = self._index.revisions(name)
            matches = [r for r in retained if r.record.digest.startswith(digest_prefix or "")]
            if not matches:
                shown = ", ".join(each.record.digest[:12] for each in retained) or "none"
                target = (
                    f"a revision with digest {digest_prefix}…" if digest_prefix else "a revision"
                )
                raise InvalidSelector(
                    f"adapter {name!r} has not kept {target} beside the current one; kept: {shown}"
                )
            record, content = matches[0]
            report = self._registry.report(content)
            options = PutOptions(
                if_match=if_match,
                description=record.description,
                examples=record.examples,
                provenance=record.provenance,
                expires=current.record.expires,  # of the name, not of a revision
                defaults=record.defaults,
            )
            change = self.point(name, content, report, options)
        return self._cards.of_change(change, report)

    def edit(
        self, name: str, change: Callable[[AdapterCard], CardEdit], if_match: str | None
    ) -> AdapterCard:
        """See ``AdapterStore.edit``."""
        with self.changing(name):
            while True:
                self._registry.refresh(name)
                card = self._cards.get(name)
                edit, etag = change(card), if_match or card.etag
                try:
                    self._change(name, lambda state: state.edited(edit, if_match=etag))  # noqa: B023
                except RevisionConflict:  # another server was faster
                    if if_match is not None:
                        raise
                    continue
                return self._cards.get(name)

    def set_expiry(self, name: str, expires: float | None) -> None:
        with self.changing(name):
            self._change(name, lambda state: state.expiring(expires))

    def set_pinned(self, name: str, *, pinned: bool, quota: Quota) -> None:
        """Raises UnknownAdapter or QuotaExceeded."""
        with self._lock:
            if quota.max_pins is not None:
                tenant = tenant_of(name)
                self._registry.refresh_tenant(tenant)
                names = self._index.of_tenant(tenant)
                pins = {other for other, (current, *_) in names.items() if current.pinned}
                quota.check_pins(len({*pins, name}))
            with self.changing(name):
                self._change(name, lambda state: state.pinned(pinned=pinned))

    def expire(self, now: float) -> tuple[str, ...]:
        """Delete the names that expire by ``now``."""
        expired = []
        for record in self._index.expired(now):
            with suppress(UnknownAdapter):  # deleted or renewed by another server
                self.delete(record.name, expired_by=now)
                expired.append(record.name)
        return tuple(expired)

    def delete(
        self, name: str, *, if_match: str | None = None, expired_by: float | None = None
    ) -> Deletion:
        """Delete the name. With ``expired_by``, delete it only if it expires by that time.

        Raises UnknownAdapter or RevisionConflict.
        """
        with self.changing(name):
            self._registry.refresh(name)
            self._index.current(name)  # the error suggests similar names
            deleting = self._registry.change(name, lambda s: s.deleted(if_match, expired_by))
            with deleting as change, self._state.writing:
                assert change.before.record is not None
                digest = change.before.record.digest
                lost = {*self._index.apply(change.before), *self._index.apply(change.after)}
                self._apply_pins()
                deletion = Deletion(name, digest, self._state.tier.n_leases(digest))
                if self._index.is_named(digest):
                    deletion.freed.set_result(TierBytes(0, 0))
                else:
                    self._garbage.wait_for(digest, deletion.freed)
        for each in lost - {digest}:
            self._garbage.retire_later(each)
        self._garbage.retire(digest)  # does nothing while the digest is leased
        return deletion

    def _change(
        self, name: str, transition: Transition, report: LoadReport | None = None
    ) -> Change:
        with self._registry.change(name, transition, report) as change:
            self.apply(change.after)
        return change

    def _apply_pins(self) -> None:
        """Pin in host memory what names pin. Call it while writing."""
        pinned = self._index.pinned_digests()
        if pinned == self._pinned:
            return
        self._pinned = pinned
        self._state.tier.pin(pinned)
        for listener in self._listeners:
            listener(pinned)

    def _n_kept(self, options: PutOptions) -> int:
        return self._n_kept_revisions if options.n_kept is None else options.n_kept

    def _check_quota(self, name: str, digest: str, n_bytes: int, options: PutOptions) -> None:
        """Raises QuotaExceeded if ``name`` may not point at this content."""
        quota = options.quota
        if quota.max_adapters is None and quota.max_bytes is None:
            return
        names = self._index.of_tenant(tenant_of(name))
        before = [old.digest for old in names.pop(name, ())]
        quota.check_adapters(len(names) + 1)
        retained = [old for old in before if old != digest][: self._n_kept(options)]
        digests = {record.digest for revisions in names.values() for record in revisions}
        if quota.max_bytes is not None:
            others = {*digests, *retained} - {digest}
            quota.check_bytes(n_bytes + self._n_bytes(tenant_of(name), others))

    def _n_bytes(self, tenant: str, digests: Iterable[str]) -> int:
        contents = (self._index.content(digest) for digest in digests)
        n_bytes = sum(content.disk_bytes for content in contents if content is not None)
        return n_bytes + self._other_bytes(tenant)
