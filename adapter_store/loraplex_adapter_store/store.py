"""The adapter store: names, contents, leases. Synchronous and thread-safe.

Reading an adapter in, loading it to memory and deleting it happen on the calling thread: call from
a worker thread, not from an event loop. ``acquire`` of a resident adapter takes microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from .additions import Additions, Progress, WithCard
from .base_spec import BaseSpec
from .card import AdapterCard, CardEdit, DeleteReport, PlanSize, StoreStats, TierBytes
from .cards import Cards
from .catalogue.catalogue import Catalogue
from .catalogue.catalogue_registry import CatalogueRegistry
from .catalogue.following import Following
from .catalogue.freshness import Freshness
from .catalogue.limits import CatalogueLimits
from .catalogue.local_contents import LocalContents
from .catalogue.shared_contents import SharedContents
from .content_files import ContentFiles
from .content_loader import ContentLoader, PlanCheck
from .deletion import Deletion
from .disk import Disk
from .errors import AdapterInUse, AdapterPinned, StoreClosed
from .eviction import POLICIES
from .faults import FaultLog, NoFaultLog
from .host_tier import HostTier
from .ingest import AdapterFiles, chunks_of
from .lease import AdapterLease
from .leasing import Leasing
from .library import GateOf
from .limits import StoreLimits
from .name_changes import NameChanges
from .name_index import NameIndex
from .name_refresh import NameRefresh
from .name_registry import NameRegistry
from .names import check_name, tenant_of
from .packed_files import PackedFiles, Packer
from .packed_plans import PackedPlans
from .pins import Pins
from .put_options import PutOptions
from .quota import NO_QUOTA, Quota
from .registry import Registry
from .report import JsonValue
from .retirement import Retirement
from .root_lock import own_root
from .selector import Library, Mixture, NameRef, Selector, parse_selector

__all__ = ["AdapterLease", "AdapterStore", "Progress"]


class AdapterStore:
    """Owner of ``root``: one process at a time opens it (StoreError otherwise)."""

    def __init__(
        self,
        root: Path,
        base: BaseSpec,
        *,
        limits: StoreLimits = StoreLimits(),  # noqa: B008  frozen value
        host_bytes: int = 2 << 30,
        allowed_roots: Sequence[Path] = (),
        eviction: str = "cost-aware",
        disk: Disk | None = None,
        gate_of: GateOf | None = None,
        packer: Packer | None = None,
        check: PlanCheck | None = None,
        n_kept_revisions: int = 0,
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
        catalogue: Catalogue | None = None,
        catalogue_limits: CatalogueLimits = CatalogueLimits(),  # noqa: B008  frozen value
    ) -> None:
        """``n_kept_revisions`` older contents of each name stay, to be asked for by digest or
        rolled back to; they go with the name.

        ``gate_of`` makes the gates of libraries; without it they are refused.

        ``packer`` turns a plan into what the host tier keeps of it (the engine's own form), and
        refuses what it cannot serve, before anything is stored. It runs on the thread that adds
        the adapter, or on the one that loads it. ``check`` is for a store without an engine: it
        refuses what none could serve. ``faults`` hears of disk and catalogue failing.

        ``catalogue``: names and contents are there, for all servers that share it; a folder of
        ``root`` keeps what this one uses, apart from what it has without one. Methods then block
        for the network where the text of one does not say otherwise, and may raise
        CatalogueUnavailable.
        """
        self.base = base
        self.root = root
        self.limits = limits
        self.allowed_roots = tuple(path.resolve() for path in allowed_roots)
        disk = disk or Disk()
        disk.make_directory(root)
        self._give_up = own_root(root)
        try:
            # A cache of the catalogue is swept by its names, which are not those of the registry.
            folder = root if catalogue is None else root / "catalogue-cache"
            self._files = files = ContentFiles(folder, disk, faults)
            self._packed = packed = PackedFiles(folder, disk, packer)
            shared, contents = None, None
            if catalogue is not None:
                freshness = Freshness(catalogue_limits, faults)
                contents = SharedContents(catalogue.contents, freshness)
                shared = CatalogueRegistry(catalogue, freshness, contents)
            registry: NameRegistry = shared or Registry(root / "registry.sqlite3", faults)
        except BaseException:
            self._give_up()
            raise
        self._closed = False
        self._shared = shared
        self._registry = registry
        self._writing = writing = threading.RLock()  # serialises changes of the index and of files
        self._index = index = NameIndex(registry.names(), registry.kept(), registry.contents())
        self._tier = tier = HostTier(host_bytes, POLICIES[eviction], limits.host_wait_s)
        self._pins = Pins(index, tier)
        self._cards = cards = Cards(index, tier, registry)
        self._refresh = refresh = NameRefresh(shared, index)
        self._retirement = retirement = Retirement(
            index, tier, files, packed, registry, writing, faults
        )
        local = None
        if contents is not None:
            n_bytes = catalogue_limits.disk_bytes
            local = LocalContents(contents, files, packed, tier, writing, n_bytes)
        plans = PackedPlans(packed, index, writing, faults)
        self._loader = ContentLoader(
            base,
            files,
            packed,
            packer,
            check,
            on_prepared=lambda plan, sha256: retirement.later(partial(plans.keep, plan, sha256)),
            remote=local,
        )
        self._leasing = Leasing(
            base,
            index,
            tier,
            self._loader,
            retirement,
            refresh,
            find_content=(lambda digest: None) if contents is None else contents.find,
            gate_of=gate_of,
            on_unservable=cards.set_unservable,
        )
        self._changes = NameChanges(
            index,
            registry,
            tier,
            retirement,
            refresh,
            cards,
            self._pins,
            writing,
            self._check_open,
            n_kept_revisions,
        )
        self._additions = Additions(
            base,
            limits,
            files,
            plans,
            index,
            tier,
            self._loader,
            retirement,
            self._changes,
            cards,
            writing,
            refresh,
            contents,
            local,
            self._check_open,
        )
        self._following = None
        if shared is not None:
            poll_s = catalogue_limits.poll_s
            self._following = Following(
                shared, index, retirement, writing, self._pins.apply, poll_s
            )
        if refresh.follow_at_start():
            retirement.sweep()
        self._pins.apply()
        cards.check_stored(self._loader)
        if self._following is not None:
            self._following.start()

    def put_directory(
        self,
        name: str,
        path: Path,
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
    ) -> AdapterCard:
        """Reads a PEFT directory. The caller vouches for ``path``; see ``put_source`` for clients.

        Raises AdapterRefused, RevisionConflict, InvalidName or SourceError; then nothing changed.
        """
        return self._additions.put_directory(name, path, options)

    def put_files(
        self,
        name: str,
        config: bytes,
        weights: bytes | Path,
        *,
        chat_template: str | None = None,
        companions: Mapping[str, bytes] = MappingProxyType({}),
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
    ) -> AdapterCard:
        """For uploads: the text of adapter_config.json and the safetensors bytes or file.

        ``companions``: those of ``companion_files`` that there are, by name.
        """
        if isinstance(weights, bytes):
            files = AdapterFiles(config, [weights], chat_template, companions)
            return self._additions.put_files(name, files, options)
        with weights.open("rb") as file:
            files = AdapterFiles(config, chunks_of(file), chat_template, companions)
            return self._additions.put_files(name, files, options)

    def upload_folder(self) -> AbstractContextManager[Path]:
        """An empty directory on the store's disk for an upload; gone afterwards, or at start."""
        return self._additions.folder()

    def put_tensors(
        self,
        name: str,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
    ) -> AdapterCard:
        """For generated adapters: a PEFT-style config and tensors in memory, same checks."""
        return self._additions.put_tensors(name, config, tensors, options)

    def put_source(
        self,
        name: str,
        uri: str,  # directory, file://, hf://org/repo[/sub][@rev], s3://, gs://, az://, https://
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
        progress: Progress | None = None,
        with_card: WithCard | None = None,
    ) -> AdapterCard:
        """Fetches, checks and stores. Directories must lie inside ``allowed_roots``.

        ``with_card`` says what the source's card.json, if it has one, adds to the options.
        """
        report = progress or (lambda stage, share: None)
        return self._additions.put_source(name, uri, self.allowed_roots, options, report, with_card)

    def get(self, name: str) -> AdapterCard:
        """The card with its load report. Raises UnknownAdapter."""
        self._refresh.follow(name)
        self._check_open()
        return self._cards.get(name)

    def has_name(self, name: str) -> bool:
        """Takes a microsecond and never waits: with a catalogue, as ``follow`` has left it."""
        return self._index.has(name)

    @property
    def is_shared(self) -> bool:
        """Whether it has a catalogue, for which its methods wait."""
        return self._shared is not None

    def is_fresh(self, name: str) -> bool:
        """Whether ``has_name`` says what is so now. Takes a microsecond and never waits."""
        return self._refresh.is_fresh(name)

    def follow(self, names: Iterable[str]) -> None:
        """Brings these names up to date with the catalogue; without one there is nothing to do."""
        for name in names:
            self._refresh.follow(name)

    def check_quota(self, name: str, quota: Quota) -> None:
        """Raises QuotaExceeded where a put of ``name`` would for the number of names.

        A put asks again, in one step with the change: this spares the work before it.
        """
        if quota.max_adapters is not None:
            self._refresh.refresh_tenant(name)
            quota.check_adapters(len({*self._index.of_tenant(tenant_of(name)), name}))

    def list(self) -> tuple[AdapterCard, ...]:
        """All cards by name, without their load reports."""
        self._refresh.follow_all()
        return self._cards.all()

    def seen(self) -> tuple[AdapterCard, ...]:
        """``list`` as this server knows it without asking a catalogue. Never waits."""
        return self._cards.all()

    def revisions(self, name: str) -> tuple[AdapterCard, ...]:
        """What ``name`` can be asked for: the current revision, then kept ones, newest first.

        Without their load reports. Raises UnknownAdapter.
        """
        self._refresh.follow(name)
        return self._cards.revisions(name)

    def rollback(
        self, name: str, *, digest_prefix: str | None = None, if_match: str | None = None
    ) -> AdapterCard:
        """Makes a kept revision, by default the newest, the current one, under a new number.

        Raises UnknownAdapter, RevisionConflict, or InvalidSelector if no such revision is kept.
        """
        return self._changes.rollback(name, digest_prefix, if_match)

    def edit(
        self,
        name: str,
        change: Callable[[AdapterCard], CardEdit],
        *,
        if_match: str | None = None,
    ) -> AdapterCard:
        """A new card for the same content; ``change`` sees the present one.

        ``if_match``: the ETag that the card must have. Raises UnknownAdapter, RevisionConflict or
        what ``change`` raises; then nothing changed.
        """
        return self._changes.edit(name, change, if_match)

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of every content the name ever had, oldest first."""
        return self._registry.history(name)

    def set_expiry(self, name: str, expires: float | None) -> AdapterCard:
        """``expires``: seconds since the epoch; a put of the name sets it anew."""
        self._changes.set_expiry(name, expires)
        return self.get(name)

    def next_expiry(self) -> float | None:
        """When the first name expires; None if none does, or the store is closed."""
        return None if self._closed else self._index.next_expiry()

    def expire(self, now: float) -> tuple[str, ...]:
        """Removes the names whose time has come. Their running requests finish."""
        return () if self._closed else self._changes.expire(now)

    def stats(self) -> StoreStats:
        return self._cards.stats()

    def plans_in_memory(self) -> dict[str, PlanSize]:
        """By digest, mixtures too. Takes microseconds."""
        return self._cards.plans_in_memory()

    def acquire(
        self,
        selector: Selector | str,
        cancelled: threading.Event | None = None,
        *,
        tenant: str = "",
    ) -> AdapterLease:
        """A lease on the content the selector means now; later changes of the name do not touch it.

        Loads to host memory on the calling thread if needed, once however many ask. Raises
        UnknownAdapter, InvalidSelector (descriptions and "auto" are resolved before),
        LimitExceeded for what host memory can never hold, HostTierFull, or StoredAdapterDamaged.

        ``cancelled`` ends a fetch from the catalogue and a wait for room, within seconds:
        LoadCancelled. ``tenant``: who asks, and has the memory that a mixture takes; an adapter's
        counts as its owner's.
        """
        self._check_open()
        wanted = parse_selector(selector) if isinstance(selector, str) else selector
        return self._leasing.acquire(wanted, cancelled, tenant=tenant)

    def acquire_digest(
        self, name: str, digest: str, cancelled: threading.Event | None = None
    ) -> AdapterLease:
        """A lease on the content that ``name`` had when it was resolved elsewhere, in a gateway.

        ``digest`` is whole. The name need not have it any more: a request keeps the digest that it
        began with, as long as the catalogue has its files (an hour at least after the name let it
        go). Raises UnknownAdapter if it is nowhere, and what ``acquire`` raises.
        """
        self._check_open()
        return self._leasing.acquire_digest(check_name(name), digest, cancelled)

    def acquire_digests(
        self,
        selector: Mixture | Library,
        cancelled: threading.Event | None = None,
        *,
        tenant: str,
    ) -> AdapterLease:
        """The same of a mixture or library, each of whose parts has its digest."""
        self._check_open()
        return self._leasing.acquire_digests(selector, tenant, cancelled)

    def check_known(self, ref: NameRef) -> None:
        """Raises UnknownAdapter where ``acquire`` would; loads nothing."""
        self._check_open()
        self._leasing.check_known(ref)

    def acquire_resident(self, ref: NameRef) -> AdapterLease | None:
        """``acquire`` where it needs no load, else None, also for what does not exist.

        Takes microseconds and never waits: an event loop may call it, and ask ``acquire`` on
        another thread when it gets None.
        """
        return self._leasing.acquire_resident(ref)

    def pin(self, name: str, quota: Quota = NO_QUOTA) -> AdapterCard:
        """Loads the adapter and keeps it in host memory, also after a restart once it is used.

        Raises UnknownAdapter, QuotaExceeded and what ``acquire`` raises.
        """
        self._changes.set_pinned(name, pinned=True, quota=quota)
        return self.warm(name)

    def unpin(self, name: str) -> AdapterCard:
        self._changes.set_pinned(name, pinned=False, quota=NO_QUOTA)
        return self.get(name)

    def warm(self, name: str) -> AdapterCard:
        """Loads the adapter to host memory now."""
        self.acquire(NameRef(check_name(name))).release()
        return self.get(name)

    def unload(self, name: str) -> AdapterCard:
        """Takes the adapter out of host memory. Name and files stay: the next use loads it again.

        Memory is by content: other names of the same one are unloaded, too; mixtures are contents
        of their own. Raises UnknownAdapter, AdapterPinned or AdapterInUse; then nothing changed.
        """
        card = self.get(name)
        pinned = self._index.pinned_as(name)
        if pinned is not None:
            raise AdapterPinned(name, pinned)
        n_uses = self.unload_digest(card.digest)
        if n_uses:
            raise AdapterInUse(name, n_uses)
        return self.get(name)

    def unload_digest(self, digest: str) -> int:
        """Takes an idle content out of host memory; returns how many uses keep it there.

        Takes microseconds. One that is pinned stays.
        """
        return self._tier.unload(digest)

    def delete(
        self, name: str, *, if_match: str | None = None, timeout_s: float = 30.0
    ) -> DeleteReport:
        """Takes the name away at once, waits for running leases, frees the bytes and counts them.

        After the timeout the report says ``drained=False``; the rest goes with the last lease.
        """
        deletion = self.start_delete(name, if_match=if_match)
        try:
            freed: TierBytes | None = deletion.freed.result(timeout_s)
        except TimeoutError:
            freed = None
        return deletion.report(freed)

    def start_delete(self, name: str, *, if_match: str | None = None) -> Deletion:
        """Takes the name away at once and does not wait; ``freed`` is done with the last lease."""
        return self._changes.delete(name, if_match=if_match)

    def on_retired(self, listener: Callable[[str], None]) -> None:
        """``listener(digest)`` runs when no name and no lease reaches a digest any more.

        It runs on the thread that released or deleted it, must not block, and must not raise.
        """
        self._retirement.listen(listener)

    def on_pinned(self, listener: Callable[[frozenset[str]], None]) -> None:
        """``listener(digests)`` gets all pinned ones now, and after each change of a name.

        It runs on the thread that changed it, one at a time, must not block, and must not raise.
        """
        with self._writing:
            self._pins.listen(listener)

    def close(self) -> None:
        """Waits for running clean-up. Leased plans stay valid; the store answers StoreClosed."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
        if self._following is not None:
            self._following.close()
        self._retirement.close()
        self._registry.close()
        self._give_up()

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the adapter store is closed")
