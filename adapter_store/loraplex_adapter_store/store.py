"""The adapter store: names, contents, leases. Synchronous and thread-safe.

Reading an adapter in, loading it to memory and deleting it happen on the calling thread: call from
a worker thread, not from an event loop. ``acquire`` of a resident adapter takes microseconds.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import safetensors.torch
from torch import Tensor

from loraplex_adapter_store.sources.local import LocalFiles, read_card, read_directory
from loraplex_adapter_store.sources.uri import fetch

from .base_spec import BaseSpec
from .card import AdapterCard, DeleteReport, StoreStats, TierBytes
from .catalogue.catalogue import Catalogue
from .catalogue.catalogue_registry import CatalogueRegistry
from .catalogue.following import Following
from .catalogue.limits import CatalogueLimits
from .catalogue.local_contents import LocalContents
from .content_files import ContentFiles
from .content_loader import ContentLoader, PlanCheck
from .deletion import Deletion
from .disk import Disk
from .errors import (
    CatalogueUnavailable,
    InvalidSelector,
    RevisionConflict,
    StoreClosed,
    StoreError,
    UnknownAdapter,
)
from .eviction import POLICIES
from .faults import FaultLog, NoFaultLog
from .host_tier import HostTier
from .ingest import AdapterFiles, Ingested, ingest
from .lease import AdapterLease
from .leasing import Leasing
from .library import GateOf
from .limits import StoreLimits
from .name_index import NameIndex
from .name_record import Content, NameRecord, Put, check_match
from .name_registry import NameRegistry
from .names import check_name, is_valid_name, tenant_of
from .packed_files import PackedFiles, Packer
from .plan import AdapterPlan, Family
from .put_options import PutOptions
from .quota import NO_QUOTA, Quota
from .registry import Registry
from .report import JsonValue, LoadReport
from .retirement import Retirement
from .root_lock import own_root
from .selector import Library, Mixture, NameRef, Selector, parse_selector

__all__ = ["AdapterLease", "AdapterStore", "CardEdit", "PlanSize", "Progress"]


class CardEdit(NamedTuple):
    """What of a card can change."""

    description: str | None
    examples: Sequence[str]
    defaults: Mapping[str, JsonValue]


class PlanSize(NamedTuple):
    n_bytes: int
    rank: int  # the largest; 0: none, or a mixture


Progress = Callable[[str, float], None]  # stage, share done in [0, 1]

_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


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

        ``catalogue``: names and contents are there, for all servers that share it; ``root`` keeps
        what this one uses. Methods then block for the network where the text of one does not say
        otherwise, and may raise CatalogueUnavailable.
        """
        self.base = base
        self.root = root
        self.limits = limits
        self.allowed_roots = tuple(path.resolve() for path in allowed_roots)
        self._n_kept_revisions = n_kept_revisions
        self._faults = faults
        disk = disk or Disk()
        disk.make_directory(root)
        self._give_up = own_root(root)
        try:
            self._files = ContentFiles(root, disk, faults)
            self._packed = PackedFiles(root, disk, packer)
            self._shared = (
                None
                if catalogue is None
                else CatalogueRegistry(catalogue, faults, catalogue_limits)
            )
            self._registry: NameRegistry = self._shared or Registry(
                root / "registry.sqlite3", faults
            )
        except BaseException:
            self._give_up()
            raise
        self._index = NameIndex(
            self._registry.names(), self._registry.kept(), self._registry.contents()
        )
        self._tier = HostTier(host_bytes, POLICIES[eviction], limits.host_wait_s)
        self._writing = threading.RLock()  # serialises changes of the index and of files
        self._changing = threading.RLock()  # serialises changes of names; taken before the other
        self._local = (
            None
            if self._shared is None
            else LocalContents(
                self._shared,
                self._files,
                self._packed,
                self._tier,
                self._writing,
                catalogue_limits.disk_bytes,
            )
        )
        self._loader = ContentLoader(
            base,
            self._files,
            self._packed,
            packer,
            check,
            on_prepared=lambda plan: self._retirement.later(self._keep_prepared, plan),
            remote=self._local,
        )
        self._retirement = Retirement(
            self._index,
            self._tier,
            self._files,
            self._packed,
            self._registry,
            self._writing,
            faults,
        )
        self._unservable: dict[str, str] = {}  # digest → why
        self._leasing = Leasing(
            base,
            self._index,
            self._tier,
            self._loader,
            self._retirement,
            gate_of,
            on_unservable=self._unservable.__setitem__,
        )
        self._closed = False
        self._on_pinned: tuple[Callable[[frozenset[str]], None], ...] = ()
        self._following = (
            None
            if self._shared is None
            else Following(
                self._shared,
                self._index,
                self._retirement,
                self._writing,
                self._pin,
                catalogue_limits.poll_s,
            )
        )
        if self._follow_at_start():
            self._retirement.sweep()
        self._pin()
        self._unservable.update(self._check_stored())
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
        source: dict[str, JsonValue] = {"source": "directory", "path": str(path)}
        files = read_directory(path, self.limits)
        return self._put_local(name, files, _with_provenance(options, source))

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
        files = AdapterFiles(config, _chunks(weights), chat_template, companions)
        return self._put(name, files, _with_provenance(options, {"source": "upload"}))

    @contextmanager
    def upload_folder(self) -> Iterator[Path]:
        """An empty directory on the store's disk for an upload; gone afterwards, or at start."""
        folder = self._files.stage()
        try:
            yield folder
        finally:
            self._files.discard(folder)

    def put_tensors(
        self,
        name: str,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
    ) -> AdapterCard:
        """For generated adapters: a PEFT-style config and tensors in memory, same checks."""
        weights = safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()})
        files = AdapterFiles(json.dumps(config).encode(), _chunks(weights), None)
        return self._put(name, files, _with_provenance(options, {"source": "generated"}))

    def put_source(
        self,
        name: str,
        uri: str,  # directory, file://, hf://org/repo[/sub][@rev], s3://, gs://, az://, https://
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
        progress: Progress | None = None,
        with_card: Callable[[bytes, PutOptions], PutOptions] | None = None,
    ) -> AdapterCard:
        """Fetches, checks and stores. Directories must lie inside ``allowed_roots``.

        ``with_card`` says what the source's card.json, if it has one, adds to the options.
        """
        check_name(name)
        report = progress or (lambda stage, share: None)
        staged = self._files.stage()
        try:
            report("fetch", 0.0)
            fetched = fetch(uri, staged, self.allowed_roots, self.limits)
            report("check", 0.5)
            card_file = None if with_card is None else read_card(fetched.files, self.limits)
            if with_card is not None and card_file is not None:
                options = with_card(card_file, options)
            told = _with_provenance(options, fetched.provenance)
            card = self._put_local(name, fetched.files, told)
            report("done", 1.0)
            return card
        finally:
            self._files.discard(staged)

    def get(self, name: str) -> AdapterCard:
        """The card with its load report. Raises UnknownAdapter."""
        self._follow(name)
        while True:
            self._check_open()
            record, content = self._index.current(name)
            try:
                report = self._registry.report(content)
            except UnknownAdapter:
                if self._index.content(record.digest) is not None:
                    raise
                continue  # the name moved, and its old content went, between the two
            return self._card(record, content, report)

    def has_name(self, name: str) -> bool:
        """Takes a microsecond and never waits: with a catalogue, as ``follow`` has left it."""
        return self._index.has(name)

    @property
    def is_shared(self) -> bool:
        """Whether it has a catalogue, for which its methods wait."""
        return self._shared is not None

    def is_fresh(self, name: str) -> bool:
        """Whether ``has_name`` says what is so now. Takes a microsecond and never waits."""
        return self._shared is None or self._shared.is_fresh(name)

    def follow(self, names: Iterable[str]) -> None:
        """Brings these names up to date with the catalogue; without one there is nothing to do."""
        for name in names:
            self._follow(name)

    def check_quota(self, name: str, quota: Quota) -> None:
        """Raises QuotaExceeded where a put of ``name`` would for the number of names.

        A put asks again, in one step with the change: this spares the work before it.
        """
        if quota.max_adapters is not None:
            self._follow_tenant(name)
            quota.check_adapters(len({*self._index.of_tenant(tenant_of(name)), name}))

    def list(self) -> tuple[AdapterCard, ...]:
        """All cards by name, without their load reports."""
        self._follow_all()
        return self.seen()

    def seen(self) -> tuple[AdapterCard, ...]:
        """``list`` as this server knows it without asking a catalogue. Never waits."""
        cards = [self._card(record, content, None) for record, content in self._index.pairs()]
        return tuple(sorted(cards, key=lambda card: card.name))

    def revisions(self, name: str) -> tuple[AdapterCard, ...]:
        """What ``name`` can be asked for: the current revision, then kept ones, newest first.

        Without their load reports. Raises UnknownAdapter.
        """
        self._follow(name)
        return tuple(
            self._card(record, content, None) for record, content in self._index.revisions(name)
        )

    def rollback(
        self, name: str, *, digest_prefix: str | None = None, if_match: str | None = None
    ) -> AdapterCard:
        """Makes a kept revision, by default the newest, the current one, under a new number.

        Raises UnknownAdapter, RevisionConflict, or InvalidSelector if no such revision is kept.
        """
        with self._changing_name(name):
            self._refresh(name)
            current, *kept = self._index.revisions(name)
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
                defaults=record.defaults,
            )
            put = self._point(name, content, report, options)
        return self._card(put.record, content, report, current[0].digest)

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
        with self._changing_name(name):
            while True:
                self._refresh(name)
                card = self.get(name)
                described, examples, defaults = change(card)
                try:
                    record = self._registry.edit(
                        name,
                        if_match=if_match or card.etag,
                        description=described,
                        examples=tuple(examples),
                        defaults=defaults,
                    )
                except RevisionConflict:  # another server was faster
                    if if_match is not None:
                        raise
                    continue
                self._index.update(record)
                return self.get(name)

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of every content the name ever had, oldest first."""
        return self._registry.history(name)

    def set_expiry(self, name: str, expires: float | None) -> AdapterCard:
        """``expires``: seconds since the epoch; a put of the name sets it anew."""
        with self._changing_name(name):
            record = self._registry.set_expiry(name, expires)
            self._index.update(record)
        return self.get(name)

    def next_expiry(self) -> float | None:
        """When the first name expires; None if none does, or the store is closed."""
        return None if self._closed else self._index.next_expiry()

    def expire(self, now: float) -> tuple[str, ...]:
        """Removes the names whose time has come. Their running requests finish."""
        expired = []
        for record in () if self._closed else self._index.expired(now):
            with suppress(UnknownAdapter):  # another server was faster, or its life began anew
                self._start_delete(record.name, expired_by=now)
                expired.append(record.name)
        return tuple(expired)

    def stats(self) -> StoreStats:
        tier = self._tier.stats()
        contents = self._index.contents()
        return StoreStats(
            n_adapters=len(self._index.pairs()),
            n_digests=len(contents),
            n_leases=tier.n_leases,
            disk_bytes=sum(content.disk_bytes for content in contents),
            host_bytes_used=tier.bytes_used,
            host_bytes_total=tier.bytes_total,
            n_host_plans=tier.n_plans,
            n_host_hits=tier.n_hits,
            n_host_loads=tier.n_loads,
            n_host_evictions=tier.n_evictions,
            load_seconds=tier.load_seconds,
        )

    def plans_in_memory(self) -> dict[str, PlanSize]:
        """By digest, mixtures too. Takes microseconds."""
        found = {}
        for digest, n_bytes in self._tier.sizes().items():
            content = self._index.content(digest)
            ranks = () if content is None else content.ranks
            found[digest] = PlanSize(n_bytes, max(ranks, default=0))
        return found

    def acquire(
        self, selector: Selector | str, cancelled: threading.Event | None = None
    ) -> AdapterLease:
        """A lease on the content the selector means now; later changes of the name do not touch it.

        Loads to host memory on the calling thread if needed, once however many ask. Raises
        UnknownAdapter, InvalidSelector (descriptions and "auto" are resolved before), HostTierFull,
        or StoredAdapterDamaged.

        ``cancelled`` ends a fetch from the catalogue, within seconds: LoadCancelled.
        """
        self._check_open()
        wanted = parse_selector(selector) if isinstance(selector, str) else selector
        for ref in _refs(wanted):
            self._follow_ref(ref)
        return self._leasing.acquire(wanted, cancelled)

    def acquire_digest(
        self, name: str, digest: str, cancelled: threading.Event | None = None
    ) -> AdapterLease:
        """A lease on the content that ``name`` had when it was resolved elsewhere, in a gateway.

        ``digest`` is whole. The name need not have it any more: a request keeps the digest that it
        began with, as long as the catalogue has its files (an hour at least after the name let it
        go). Raises UnknownAdapter if it is nowhere, and what ``acquire`` raises.
        """
        self._check_open()
        ref = NameRef(check_name(name), digest)
        if self._index.find(name, digest) is not None:
            return self._leasing.acquire(ref, cancelled)
        content = self._index.content(digest)
        if content is None and self._shared is not None:
            content = self._shared.find_content(digest)
        if content is None:
            raise UnknownAdapter(str(ref))
        return self._leasing.acquire_content(_unnamed(name, digest), content, cancelled)

    def check_known(self, ref: NameRef) -> None:
        """Raises UnknownAdapter where ``acquire`` would; loads nothing."""
        self._check_open()
        self._follow_ref(ref)
        self._leasing.find(ref)

    def acquire_resident(self, ref: NameRef) -> AdapterLease | None:
        """``acquire`` where it needs no load, else None, also for what does not exist.

        Takes microseconds and never waits: an event loop may call it, and ask ``acquire`` on
        another thread when it gets None.
        """
        if ref.digest_prefix is None and not self.is_fresh(ref.name):
            return None
        return self._leasing.acquire_resident(ref)

    def pin(self, name: str, quota: Quota = NO_QUOTA) -> AdapterCard:
        """Loads the adapter and keeps it in host memory, also after a restart once it is used.

        Raises UnknownAdapter, QuotaExceeded and what ``acquire`` raises.
        """
        self._set_pinned(name, pinned=True, quota=quota)
        return self.warm(name)

    def unpin(self, name: str) -> AdapterCard:
        self._set_pinned(name, pinned=False, quota=NO_QUOTA)
        return self.get(name)

    def warm(self, name: str) -> AdapterCard:
        """Loads the adapter to host memory now."""
        self.acquire(NameRef(check_name(name))).release()
        return self.get(name)

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
        return self._start_delete(name, if_match=if_match)

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
            self._on_pinned = (*self._on_pinned, listener)
            listener(self._index.pinned_digests())

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_delete(
        self, name: str, *, if_match: str | None = None, expired_by: float | None = None
    ) -> Deletion:
        """``expired_by``: only if it expires by then. Raises UnknownAdapter, RevisionConflict."""
        with self._changing_name(name):
            self._refresh(name)
            self._index.current(name)  # an unknown name is told with its neighbours
            self._registry.remove_name(name, if_match, expired_by=expired_by)
            with self._writing:
                digest = self._index.current(name)[0].digest
                removed = self._index.remove_name(name)
                self._pin()
                deletion = Deletion(name, digest, self._tier.n_leases(digest))
                if removed.has_other_names:
                    deletion.freed.set_result(TierBytes(0, 0))
                else:
                    self._retirement.wait_for(digest, deletion.freed)
        for kept in removed.kept:
            self._retirement.retire_later(kept)
        self._retirement.retire(digest)  # nothing while it is leased
        return deletion

    @contextmanager
    def _changing_name(self, name: str) -> Iterator[None]:
        """One change at a time, and none of this name from the catalogue meanwhile."""
        held = nullcontext() if self._shared is None else self._shared.changing(name)
        with self._changing, held:
            self._check_open()
            yield

    def _follow(self, name: str) -> None:
        if self._shared is not None and is_valid_name(name):
            self._shared.follow(name)

    def _pin(self) -> None:
        """What is pinned stays where it is. Call it while writing."""
        digests = self._index.pinned_digests()
        self._tier.pin(digests)
        for listener in self._on_pinned:
            listener(digests)

    def _refresh(self, name: str) -> None:
        """Before a change, which must not be judged by what is a second old."""
        if self._shared is not None:
            self._shared.refresh(name)

    def _follow_all(self) -> None:
        if self._shared is not None:
            self._shared.follow_all()

    def _follow_tenant(self, name: str) -> None:
        """All names of the one whose ``name`` is."""
        if self._shared is not None:
            self._shared.follow_tenant(tenant_of(name))

    def _follow_ref(self, ref: NameRef) -> None:
        """A digest that is here is what it is, whether the catalogue answers or not."""
        try:
            self._follow(ref.name)
        except CatalogueUnavailable:
            if not ref.digest_prefix or self._index.find(ref.name, ref.digest_prefix) is None:
                raise

    def _follow_before_put(self, name: str, options: PutOptions) -> None:
        self._refresh(name)
        if options.quota.max_adapters is not None or options.quota.max_bytes is not None:
            self._follow_tenant(name)

    def _follow_at_start(self) -> bool:
        """Whether all names are known. A server starts without its catalogue, too."""
        try:
            self._follow_all()
        except CatalogueUnavailable as error:
            _log.warning("%s; adapters are served when it is back", error)
            return False
        return True

    def _put_local(self, name: str, files: LocalFiles, options: PutOptions) -> AdapterCard:
        with files.open_weights() as weights:
            chunks = iter(lambda: weights.read(_CHUNK), b"")
            adapter = AdapterFiles(files.config, chunks, files.chat_template, files.companions)
            return self._put(name, adapter, options)

    def _put(self, name: str, files: AdapterFiles, options: PutOptions) -> AdapterCard:
        check_name(name)
        self._check_open()
        with ingest(files, self._files, self.base, self.limits, tenant=tenant_of(name)) as ingested:
            prepared = self._loader.prepare(ingested.reading.plan)
            content = self._offer(name, ingested, options)
            self._retirement.hold(content.digest)  # a delete from here on waits for the rest
            try:
                put = self._commit(name, content, ingested, options)
                self._unservable.pop(content.digest, None)
                self._keep_prepared(prepared)
                if self._tier.has_room(content.host_bytes):  # a new content is likely to be used
                    self._tier.lease(
                        content.digest, content.host_bytes, lambda: prepared, tenant=tenant_of(name)
                    )
                    self._tier.release(content.digest)
                if self._local is not None:
                    self._local.make_room()
            finally:
                self._retirement.let_go(content.digest)
        replaced = None if put.previous is None else put.previous.digest
        return self._card(put.record, content, ingested.reading.report, replaced)

    def _offer(self, name: str, ingested: Ingested, options: PutOptions) -> Content:
        """What the name will point at; with a catalogue its files are there, for all servers."""
        plan, report = ingested.reading
        content = Content(
            digest=plan.digest,
            family=_family(plan, options.provenance or {}),
            ranks=tuple(sorted({m.rank for m in plan.modules.values() if m.rank})),
            disk_bytes=ingested.n_bytes,
            host_bytes=plan.n_bytes,
            base_fingerprint=self.base.fingerprint,
            plan_sha256=ingested.plan_sha256,
            task=None if plan.head is None else plan.head.task,
        )
        if self._shared is None:
            return content
        self._follow_before_put(name, options)
        self._check_put(name, content, options)  # spares the upload
        return self._shared.offer(content, report, ingested.staged, tenant_of(name))

    def _commit(self, name: str, content: Content, ingested: Ingested, options: PutOptions) -> Put:
        """Publishes the files, then moves the name."""
        try:
            with self._changing:
                self._follow_before_put(name, options)
                with self._changing_name(name):
                    self._check_put(name, content, options)  # before any file moves
                    return self._publish(name, content, ingested, options)
        finally:
            if self._shared is not None:
                self._shared.withdraw(content)

    def _publish(self, name: str, content: Content, ingested: Ingested, options: PutOptions) -> Put:
        with self._writing:
            was_there = self._index.content(content.digest) is not None
            self._files.publish(ingested.staged, content.digest)
        try:
            return self._point(name, content, ingested.reading.report, options)
        except (StoreError, sqlite3.Error) as error:
            # After an input/output error the change may yet be found in SQLite's log by the
            # next start; if it is not, that start sweeps the files.
            is_undone = not getattr(error, "sqlite_errorname", "").startswith("SQLITE_IOERR")
            if is_undone and not was_there:
                with self._writing:
                    self._files.remove(content.digest)
            raise

    def _check_put(self, name: str, content: Content, options: PutOptions) -> None:
        """Raises RevisionConflict or QuotaExceeded where the put would, as far as is known."""
        found = self._index.find(name)
        current = None if found is None else found[0]
        check_match(name, current, options.if_match, options.replace)
        self._check_quota(name, content.digest, content.disk_bytes, options.quota)

    def _check_quota(self, name: str, digest: str, n_bytes: int, quota: Quota) -> None:
        """Raises QuotaExceeded if ``name`` may not point at this content. Call it while writing."""
        if quota.max_adapters is None and quota.max_bytes is None:
            return
        names = self._index.of_tenant(tenant_of(name))
        before = [old.digest for old in names.pop(name, ())]
        quota.check_adapters(len(names) + 1)
        kept = [old for old in before if old != digest][: self._n_kept_revisions]
        digests = {record.digest for revisions in names.values() for record in revisions}
        contents = (self._index.content(other) for other in {*digests, *kept} - {digest})
        quota.check_bytes(n_bytes + sum(c.disk_bytes for c in contents if c is not None))

    def _point(self, name: str, content: Content, report: LoadReport, options: PutOptions) -> Put:
        """Moves the name. Raises RevisionConflict."""
        put = self._registry.put(
            name,
            content,
            report,
            if_match=options.if_match,
            replace=options.replace,
            description=options.description,
            examples=tuple(options.examples),
            provenance=options.provenance or {},
            defaults=options.defaults,
            created=time.time(),
            expires=options.expires,
            n_kept=self._n_kept_revisions,
        )
        with self._writing:
            let_go = self._index.point(put, content)
            self._pin()
            self._retirement.named_again(content.digest)
        for digest in let_go:
            self._retirement.retire_later(digest)
        return put

    def _keep_prepared(self, plan: AdapterPlan) -> None:
        """For loads to come. It is a cache: without it they take longer, no more."""
        if plan.packed_adapter is None:
            return
        try:
            staged = self._packed.stage(plan)
            with self._writing:
                if self._index.content(plan.digest) is None:  # deleted meanwhile
                    self._packed.discard(staged)
                else:
                    self._packed.publish(staged, plan.digest)
            self._faults.worked("storage")
        except OSError as error:
            self._faults.failed("storage", error)
            _log.warning(
                "adapter %s is not kept in prepared form, its loads from disk take longer: %s",
                plan.digest[:12],
                error,
            )

    def _set_pinned(self, name: str, *, pinned: bool, quota: Quota) -> None:
        with self._changing:
            if quota.max_pins is not None:
                self._follow_tenant(name)
                names = self._index.of_tenant(tenant_of(name))
                pins = {other for other, (current, *_) in names.items() if current.pinned}
                quota.check_pins(len({*pins, name}))
            self._pin_name(name, pinned=pinned)

    def _pin_name(self, name: str, *, pinned: bool) -> None:
        with self._changing_name(name):
            self._index.update(self._registry.set_pinned(name, pinned=pinned))
            self._pin()

    def _check_stored(self) -> dict[str, str]:
        """Contents of earlier servers that this one cannot serve stay, and their cards say why."""
        found = {}
        for content in self._index.contents():
            refusal = self._loader.refusal(content)
            if refusal is not None:
                _log.warning("adapter %s is not served: %s", content.digest[:12], refusal)
                found[content.digest] = refusal
        return found

    def _card(
        self,
        record: NameRecord,
        content: Content,
        report: LoadReport | None,
        replaced: str | None = None,
    ) -> AdapterCard:
        return AdapterCard(
            name=record.name,
            digest=record.digest,
            revision=record.revision,
            family=content.family,
            description=record.description,
            examples=record.examples,
            ranks=content.ranks,
            n_bytes=TierBytes(content.disk_bytes, self._tier.bytes_of(record.digest)),
            created=record.created,
            base_fingerprint=content.base_fingerprint,
            pinned=record.pinned,
            n_leases=self._tier.n_leases(record.digest),
            report=report,
            provenance=record.provenance,
            defaults=record.defaults,
            etag=record.etag,
            expires=record.expires,
            replaced=replaced,
            unservable=self._unservable.get(record.digest),
            task=content.task,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the adapter store is closed")


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


def _unnamed(name: str, digest: str) -> NameRecord:
    """For a content that the name does not have any more."""
    return NameRecord(name, 0, digest, None, (), {}, 0.0)


def _family(plan: AdapterPlan, provenance: Mapping[str, JsonValue]) -> Family:
    return Family.GENERATED if provenance.get("source") == "generated" else plan.family


def _with_provenance(options: PutOptions, source: Mapping[str, JsonValue]) -> PutOptions:
    """Where a content comes from, unless the options say so."""
    return options if options.provenance else replace(options, provenance=dict(source))


def _chunks(weights: bytes | Path) -> Iterator[bytes]:
    if isinstance(weights, bytes):
        for start in range(0, len(weights), _CHUNK):
            yield weights[start : start + _CHUNK]
        return
    with weights.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK), b"")
