"""From a selector to a leased plan: look up, count the use, load once, give out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from .base_spec import BaseSpec
from .composite import Composite
from .content_loader import ContentLoader
from .errors import (
    InvalidSelector,
    LimitExceeded,
    LoadCancelled,
    UnknownAdapter,
    UnservableAdapter,
)
from .host_tier import HostTier
from .lease import AdapterLease, AdapterRecipe
from .library import GateOf
from .name_index import NameIndex
from .name_record import Content, NameRecord
from .name_refresh import NameRefresh
from .names import tenant_of
from .plan import AdapterPlan
from .retirement import Retirement
from .selector import Library, Mixture, NameRef, Selector

__all__ = ["Leasing"]


class Leasing:
    """Thread-safe. Loads happen on the calling thread, once for each digest."""

    def __init__(
        self,
        base: BaseSpec,
        index: NameIndex,
        tier: HostTier,
        loader: ContentLoader,
        retirement: Retirement,
        refresh: NameRefresh,
        find_content: Callable[[str], Content | None],
        gate_of: GateOf | None,
        on_unservable: Callable[[str, str], None],
    ) -> None:
        """``find_content(digest)``: one that no name here has, where the catalogue still has it.

        ``on_unservable(digest, why)``: a content of an earlier server that this one refuses.
        """
        self._base = base
        self._index = index
        self._tier = tier
        self._loader = loader
        self._retirement = retirement
        self._refresh = refresh
        self._find_content = find_content
        self._gate_of = gate_of
        self._on_unservable = on_unservable

    def acquire(
        self, selector: Selector, cancelled: threading.Event | None = None, *, tenant: str = ""
    ) -> AdapterLease:
        """See ``AdapterStore.acquire``. Raises UnservableAdapter, too."""
        LoadCancelled.raise_if(cancelled)
        for ref in _refs(selector):
            self._refresh.follow_ref(ref)
        if isinstance(selector, NameRef):
            return self._lease_held(*self._hold(selector), cancelled)
        if isinstance(selector, Mixture | Library):
            return self._acquire_composite(selector, tenant, self._hold, cancelled)
        raise InvalidSelector("name the adapter: 'auto' and descriptions are not resolved here")

    def acquire_digest(
        self, name: str, digest: str, cancelled: threading.Event | None = None
    ) -> AdapterLease:
        """See ``AdapterStore.acquire_digest``."""
        return self._lease_held(*self._hold_digest(NameRef(name, digest)), cancelled)

    def acquire_digests(
        self, selector: Mixture | Library, tenant: str, cancelled: threading.Event | None
    ) -> AdapterLease:
        """See ``AdapterStore.acquire_digests``."""
        return self._acquire_composite(selector, tenant, self._hold_digest, cancelled)

    def acquire_resident(self, ref: NameRef) -> AdapterLease | None:
        """None where a load is needed, or nothing is meant. Never waits."""
        if ref.digest_prefix is None and not self._refresh.is_fresh(ref.name):
            return None
        found = self._index.find(ref.name, ref.digest_prefix)
        if found is None:
            return None
        record, content = found
        plan = self._tier.lease_resident(content.digest)
        if plan is None:
            return None
        if self._index.content(content.digest) is None:  # retired between look-up and count
            self._retirement.release(content.digest)
            return None
        return self._lease(record, content, plan)

    def check_known(self, ref: NameRef) -> None:
        """Raises UnknownAdapter where ``acquire`` would; loads nothing."""
        self._refresh.follow_ref(ref)
        self._find(ref)

    def _lease_held(
        self, record: NameRecord, content: Content, cancelled: threading.Event | None
    ) -> AdapterLease:
        try:
            while True:
                try:
                    plan = self._tier.lease(
                        content.digest,
                        content.host_bytes,
                        lambda: self._loader.load(content, cancelled),
                        tenant=tenant_of(record.name),
                        cancelled=cancelled,
                    )
                    return self._lease(record, content, plan)
                except LoadCancelled:  # by another request, whose load this one waited for
                    if cancelled is not None and cancelled.is_set():
                        raise
        except UnservableAdapter as error:
            self._on_unservable(content.digest, str(error))
            raise
        finally:
            self._retirement.let_go(content.digest)

    def _acquire_composite(
        self,
        selector: Mixture | Library,
        tenant: str,
        hold: Callable[[NameRef], tuple[NameRecord, Content]],
        cancelled: threading.Event | None,
    ) -> AdapterLease:
        """The files of the parts are held while the whole is built; it is cached as any content.

        The parts themselves do not come to host memory. The whole is the tenant's who asks first.
        """
        if isinstance(selector, Mixture):
            composite = Composite.of_mixture(selector, self._base)
        else:
            composite = Composite.of_library(selector, self._gate_of)
        held: list[str] = []
        try:
            parts: list[Content] = []
            for ref in composite.refs:
                parts.append(hold(ref)[1])
                held.append(parts[-1].digest)
            digest = composite.identify(held)
            self._retirement.hold(digest)  # before the index has it: nobody forgets it meanwhile
            self._index.add_composite(digest, held)
            held.append(digest)

            def load() -> AdapterPlan:
                self._retirement.forget_evicted_composites()
                return self._loader.load_composite(composite, parts, digest)

            plan = self._tier.lease_resident(digest)
            if plan is None:
                n_bytes = self._loader.composite_bytes(composite, parts, digest)
                self._check_fits(n_bytes)
                plan = self._tier.lease(digest, n_bytes, load, tenant=tenant, cancelled=cancelled)
            recipe = AdapterRecipe(tuple(parts), selector, tenant)
            return AdapterLease(composite.label, 0, plan, self._retirement.release, recipe)
        finally:
            for each in held:
                self._retirement.let_go(each)

    def _check_fits(self, n_bytes: int) -> None:
        n_total = self._tier.stats().bytes_total
        if n_bytes > n_total:
            raise LimitExceeded(
                f"what this request combines needs {n_bytes:,} bytes of host memory, this server "
                f"has {n_total:,} for adapters; combine fewer or smaller adapters, or raise "
                "--adapter-host-memory"
            )

    def _lease(self, record: NameRecord, content: Content, plan: AdapterPlan) -> AdapterLease:
        return AdapterLease(
            record.name,
            record.revision,
            plan,
            self._retirement.release,
            AdapterRecipe((content,)),
            record.defaults,
        )

    def _hold(self, ref: NameRef) -> tuple[NameRecord, Content]:
        """What ``ref`` means now; its files and its plan stay until it is let go."""
        while True:
            record, content = self._find(ref)
            self._retirement.hold(content.digest)
            if self._index.content(content.digest) is not None:
                return record, content
            self._retirement.let_go(content.digest)  # retired between look-up and count

    def _hold_digest(self, ref: NameRef) -> tuple[NameRecord, Content]:
        """The same of a whole digest, which the name need not have any more."""
        digest = ref.digest_prefix
        assert digest is not None
        if self._index.find(ref.name, digest) is not None:
            with suppress(UnknownAdapter):  # the name was replaced or deleted by now
                return self._hold(ref)
        content = self._index.content(digest) or self._find_content(digest)
        if content is None:
            raise UnknownAdapter(str(ref))
        self._retirement.hold(digest)
        self._index.add_unnamed(content)
        return NameRecord(ref.name, 0, digest, None, (), {}, 0.0), content

    def _find(self, ref: NameRef) -> tuple[NameRecord, Content]:
        """What ``ref`` means now. Raises UnknownAdapter."""
        found = self._index.find(ref.name, ref.digest_prefix)
        if found is None:
            revisions = self._index.revisions(ref.name)
            raise UnknownAdapter(str(ref), [f"{ref.name}@{r.digest[:12]}" for r, _ in revisions])
        return found


def _refs(selector: Selector) -> Sequence[NameRef]:
    match selector:
        case NameRef():
            return (selector,)
        case Mixture(parts):
            return [part.ref for part in parts]
        case Library():
            return selector.refs
        case _:
            return ()
