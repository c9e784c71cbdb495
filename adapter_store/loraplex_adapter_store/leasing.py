"""Leases of plans: looks up a selector's content, counts the use, and loads the plan once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from loraplex_adapter_store.catalogue.shared_contents import LocalContents
from loraplex_adapter_store.composites.composite import Composite, GateOf
from loraplex_adapter_store.names.name_record import Content, NameRecord
from loraplex_adapter_store.names.name_state import Revision
from loraplex_adapter_store.names.name_syntax import check_name, tenant_of
from loraplex_adapter_store.names.selector import Library, Mixture, NameRef, Selector

from .cards import Cards
from .content_loader import ContentLoader
from .errors import (
    CatalogueUnavailable,
    InvalidSelector,
    LimitExceeded,
    LoadCancelled,
    UnknownAdapter,
    UnservableAdapter,
)
from .garbage_collector import GarbageCollector
from .plan import AdapterPlan
from .report import JsonValue
from .store_state import StoreState


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """The parts of a leased plan, from which another process can build the same plan."""

    contents: tuple[Content, ...]  # in the order of the selector's names
    selector: Mixture | Library | None = None  # how they are combined; None: a single content
    tenant: str = ""  # the owner of the combined plan's memory


@dataclass(slots=True, eq=False)
class AdapterLease:
    """The right to use one content while a request runs. Call ``release``, or use ``with``.

    For a mixture, ``revision`` is 0 and ``name`` is the mixture in words.
    """

    name: str
    revision: int
    plan: AdapterPlan
    _on_release: Callable[[str], None]
    recipe: AdapterRecipe
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)  # of requests, from the card
    _released: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def digest(self) -> str:
        return self.plan.digest

    def release(self) -> None:
        """End the lease; later calls do nothing. Any thread, never blocks."""
        if self._released.acquire(blocking=False):
            self._on_release(self.digest)

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Leasing:
    """Leases plans to requests. Thread-safe. Each digest is loaded once, on the calling thread."""

    def __init__(
        self,
        state: StoreState,
        loader: ContentLoader,
        garbage: GarbageCollector,
        cards: Cards,
        local: LocalContents | None,  # the catalogue's contents
        gate_of: GateOf | None,
    ) -> None:
        self._state = state
        self._index, self._tier, self._registry = state.index, state.tier, state.registry
        self._loader = loader
        self._garbage = garbage
        self._cards = cards
        self._local = local
        self._gate_of = gate_of

    def acquire(
        self, selector: Selector, cancelled: threading.Event | None = None, *, tenant: str = ""
    ) -> AdapterLease:
        """See ``AdapterStore.acquire``. Raises UnservableAdapter, too."""
        self._state.check_open()
        LoadCancelled.raise_if(cancelled)
        for ref in _refs(selector):
            self._follow(ref)
        if isinstance(selector, NameRef):
            return self._lease_content(*self._hold(selector), tenant, cancelled)
        if isinstance(selector, Mixture | Library):
            return self._acquire_composite(selector, tenant, self._hold, cancelled)
        raise InvalidSelector("name the adapter: 'auto' and descriptions are not resolved here")

    def acquire_digest(
        self,
        name: str,
        digest: str,
        cancelled: threading.Event | None = None,
        *,
        tenant: str = "",
    ) -> AdapterLease:
        """Lease the content that ``name`` had when a gateway resolved the name.

        ``digest`` is whole. The name may point elsewhere by now: a request keeps its digest for as
        long as the catalogue has the files, at least an hour. Raises UnknownAdapter if the content
        is nowhere, and the errors of ``acquire``.
        """
        self._state.check_open()
        ref = NameRef(check_name(name), digest)
        return self._lease_content(*self._hold_digest(ref), tenant, cancelled)

    def acquire_digests(
        self, selector: Mixture | Library, tenant: str, cancelled: threading.Event | None = None
    ) -> AdapterLease:
        """Lease a mixture or library whose parts all have digests, as ``acquire_digest`` does."""
        self._state.check_open()
        return self._acquire_composite(selector, tenant, self._hold_digest, cancelled)

    def acquire_resident(self, ref: NameRef, *, tenant: str = "") -> AdapterLease | None:
        """Lease an adapter that is in host memory; None if ``acquire`` may wait or raise.

        Takes microseconds and never waits, so that an event loop may call it first, and
        ``acquire`` on another thread if the result is None.
        """
        if ref.digest_prefix is None and not self._registry.is_fresh(ref.name):
            return None
        match = self._index.find(ref.name, ref.digest_prefix)
        if match is None:
            return None
        record, content = match
        plan = self._tier.lease_resident(content.digest, user=tenant)
        if plan is None:
            return None
        if self._index.content(content.digest) is None:  # retired between look-up and count
            self._garbage.release(content.digest, user=tenant)
            return None
        return self._lease(record, content, plan, tenant)

    def read(self, ref: NameRef) -> AdapterPlan:
        """Read an adapter's plan from disk, with factors in float32, and keep nothing in memory.

        Blocks. Raises UnknownAdapter, BaseMismatch and StoredAdapterDamaged.
        """
        self._state.check_open()
        self._follow(ref)
        content = self._hold(ref).content
        try:
            return self._loader.read(content)
        finally:
            self._garbage.let_go(content.digest)

    def check_known(self, ref: NameRef) -> None:
        """Raises UnknownAdapter as ``acquire`` does, but loads nothing."""
        self._state.check_open()
        self._follow(ref)
        self._find(ref)

    def _lease_content(
        self,
        record: NameRecord,
        content: Content,
        tenant: str,
        cancelled: threading.Event | None,
    ) -> AdapterLease:
        try:
            while True:
                try:
                    plan = self._tier.lease(
                        content.digest,
                        content.host_bytes,
                        lambda: self._loader.load(content, cancelled),
                        tenant=tenant_of(record.name),
                        user=tenant,
                        cancelled=cancelled,
                    )
                    return self._lease(record, content, plan, tenant)
                except LoadCancelled:  # another request's load, which this one waited for
                    if cancelled is not None and cancelled.is_set():
                        raise
        except UnservableAdapter as error:
            self._cards.set_unservable(content.digest, str(error))
            raise
        finally:
            self._garbage.let_go(content.digest)

    def _acquire_composite(
        self,
        selector: Mixture | Library,
        tenant: str,
        hold: Callable[[NameRef], Revision],
        cancelled: threading.Event | None,
    ) -> AdapterLease:
        """Lease a mixture or library. The files of its parts are held while the composite is built.

        Only the composite is kept in host memory, and counts as the first requester's.
        """
        if isinstance(selector, Mixture):
            composite = Composite.of_mixture(selector, self._state.base)
        else:
            composite = Composite.of_library(selector, self._gate_of)
        holds: list[str] = []  # digests
        try:
            parts: list[Content] = []
            for ref in composite.refs:
                parts.append(hold(ref)[1])
                holds.append(parts[-1].digest)
            digest = composite.identify(holds)
            self._garbage.hold(digest)  # first, so that clean-up does not forget the composite
            self._index.add_composite(digest, holds)
            holds.append(digest)

            def load() -> AdapterPlan:
                self._garbage.forget_evicted_composites()
                return self._loader.load_composite(composite, parts, digest)

            plan = self._tier.lease_resident(digest, user=tenant)
            if plan is None:
                n_bytes = self._loader.composite_bytes(composite, parts, digest)
                self._check_fits(n_bytes)
                plan = self._tier.lease(
                    digest, n_bytes, load, tenant=tenant, user=tenant, cancelled=cancelled
                )
            recipe = AdapterRecipe(tuple(parts), selector, tenant)
            release = partial(self._garbage.release, user=tenant)
            return AdapterLease(composite.label, 0, plan, release, recipe)
        finally:
            for each in holds:
                self._garbage.let_go(each)

    def _check_fits(self, n_bytes: int) -> None:
        n_total = self._tier.stats().host_bytes_total
        if n_bytes > n_total:
            raise LimitExceeded(
                f"what this request combines needs {n_bytes:,} bytes of host memory, this server "
                f"has {n_total:,} for adapters; combine fewer or smaller adapters, or raise "
                "--adapter-host-memory"
            )

    def _lease(
        self, record: NameRecord, content: Content, plan: AdapterPlan, tenant: str
    ) -> AdapterLease:
        return AdapterLease(
            record.name,
            record.revision,
            plan,
            partial(self._garbage.release, user=tenant),
            AdapterRecipe((content,)),
            record.defaults,
        )

    def _hold(self, ref: NameRef) -> Revision:
        """Resolve ``ref``, and hold its files and plan until ``let_go``."""
        while True:
            revision = self._find(ref)
            digest = revision.content.digest
            self._garbage.hold(digest)
            if self._index.content(digest) is not None:
                return revision
            self._garbage.let_go(digest)  # retired between look-up and count

    def _hold_digest(self, ref: NameRef) -> Revision:
        """Hold the content of a whole digest, which the name may have had before."""
        digest = ref.digest_prefix
        assert digest is not None
        if self._index.find(ref.name, digest) is not None:
            with suppress(UnknownAdapter):  # the name was replaced or deleted meanwhile
                return self._hold(ref)
        content = self._index.content(digest)
        if content is None and self._local is not None:
            content = self._local.shared.find(digest)
        if content is None:
            raise UnknownAdapter(str(ref))
        self._garbage.hold(digest)
        self._index.add_unnamed(content)
        return Revision(NameRecord(ref.name, 0, digest, None, (), {}, 0.0), content)

    def _follow(self, ref: NameRef) -> None:
        """Follow the name; a known digest needs no answer of the catalogue."""
        try:
            self._registry.follow(ref.name)
        except CatalogueUnavailable:
            if not ref.digest_prefix or self._index.find(ref.name, ref.digest_prefix) is None:
                raise

    def _find(self, ref: NameRef) -> Revision:
        """Resolve ``ref`` to its current revision and content. Raises UnknownAdapter."""
        match = self._index.find(ref.name, ref.digest_prefix)
        if match is None:
            revisions = self._index.revisions(ref.name)
            raise UnknownAdapter(str(ref), [f"{ref.name}@{r.digest[:12]}" for r, _ in revisions])
        return match


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
