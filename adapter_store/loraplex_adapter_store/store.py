"""The adapter store: names, contents, leases. Synchronous and thread-safe.

Reading an adapter in, loading it to memory and deleting it happen on the calling thread: call from
a worker thread, not from an event loop. ``acquire`` of a resident adapter takes microseconds.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import safetensors.torch
from torch import Tensor

from loraplex_adapter_store.sources.local import LocalFiles, read_directory
from loraplex_adapter_store.sources.uri import fetch

from .base_spec import BaseSpec
from .card import AdapterCard, DeleteReport, StoreStats, TierBytes
from .composite import Composite
from .content_files import ContentFiles
from .content_loader import ContentLoader, PlanCheck
from .deletion import Deletion
from .disk import Disk
from .errors import (
    InvalidSelector,
    RevisionConflict,
    StoreClosed,
    UnknownAdapter,
    UnservableAdapter,
)
from .eviction import POLICIES
from .host_tier import HostTier
from .ingest import AdapterFiles, Ingested, ingest
from .lease import AdapterLease
from .library import GateOf
from .limits import StoreLimits
from .name_index import NameIndex
from .names import check_name
from .packed_files import PackedFiles, Packer
from .plan import AdapterPlan, Family
from .registry import Content, NameRecord, Put, Registry
from .report import JsonValue, LoadReport
from .root_lock import own_root
from .selector import Library, Mixture, NameRef, Selector, parse_selector

__all__ = ["AdapterLease", "AdapterStore", "Progress"]

Progress = Callable[[str, float], None]  # stage, share done in [0, 1]

_CHUNK = 1 << 20
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Terms(NamedTuple):
    """What a put says beside the content."""

    if_match: str | None
    replace: bool
    description: str | None
    examples: tuple[str, ...]
    provenance: Mapping[str, JsonValue]
    expires: float | None = None


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
    ) -> None:
        """``n_kept_revisions`` older contents of each name stay, to be asked for by digest or
        rolled back to; they go with the name.

        ``gate_of`` makes the gates of libraries; without it they are refused.

        ``packer`` turns a plan into what the host tier keeps of it (the engine's own form), and
        refuses what it cannot serve, before anything is stored. It runs on the thread that adds
        the adapter, or on the one that loads it. ``check`` is for a store without an engine: it
        refuses what none could serve.
        """
        self.base = base
        self.limits = limits
        self.allowed_roots = tuple(path.resolve() for path in allowed_roots)
        self._gate_of = gate_of
        self._n_kept_revisions = n_kept_revisions
        disk = disk or Disk()
        disk.make_directory(root)
        self._give_up = own_root(root)
        try:
            self._files = ContentFiles(root, disk)
            self._prepared = PackedFiles(root, disk, packer)
            self._catalogue = Registry(root / "catalogue.sqlite3")
        except BaseException:
            self._give_up()
            raise
        self._index = NameIndex(
            self._catalogue.names(), self._catalogue.kept(), self._catalogue.contents()
        )
        self._tier = HostTier(host_bytes, POLICIES[eviction], limits.host_wait_s)
        self._loader = ContentLoader(
            base,
            self._files,
            self._prepared,
            packer,
            check,
            on_prepared=lambda plan: self._later(self._keep_prepared, plan),
        )
        self._writing = threading.RLock()  # serialises changes of names and files
        self._listeners: tuple[Callable[[str], None], ...] = ()
        self._deletions: dict[str, list[Future[TierBytes]]] = {}  # that wait for leases, by digest
        self._janitor = ThreadPoolExecutor(1, thread_name_prefix="adapter-janitor")
        self._closed = False
        self._sweep()
        self._unservable = self._check_stored()  # digest → why

    def put_directory(
        self,
        name: str,
        path: Path,
        *,
        if_match: str | None = None,  # digest the name must have now
        replace: bool = True,  # False: the name must not exist
        description: str | None = None,
        examples: Sequence[str] = (),
    ) -> AdapterCard:
        """Reads a PEFT directory. The caller vouches for ``path``; see ``put_source`` for clients.

        Raises AdapterRefused, RevisionConflict, InvalidName or SourceError; then nothing changed.
        """
        provenance: dict[str, JsonValue] = {"source": "directory", "path": str(path)}
        terms = _Terms(if_match, replace, description, tuple(examples), provenance)
        return self._put_local(name, read_directory(path, self.limits), terms)

    def put_files(
        self,
        name: str,
        config: bytes,
        weights: bytes | Path,
        *,
        chat_template: str | None = None,
        if_match: str | None = None,
        replace: bool = True,
        description: str | None = None,
        examples: Sequence[str] = (),
        provenance: Mapping[str, JsonValue] | None = None,
        expires: float | None = None,  # seconds since the epoch, see ``expire``
    ) -> AdapterCard:
        """For uploads: the text of adapter_config.json and the safetensors bytes or file."""
        source = dict(provenance or {"source": "upload"})
        terms = _Terms(if_match, replace, description, tuple(examples), source, expires)
        return self._put(name, AdapterFiles(config, _chunks(weights), chat_template), terms)

    def put_tensors(
        self,
        name: str,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        *,
        if_match: str | None = None,
        replace: bool = True,
        description: str | None = None,
        examples: Sequence[str] = (),
        provenance: Mapping[str, JsonValue] | None = None,
        expires: float | None = None,
    ) -> AdapterCard:
        """For generated adapters: a PEFT-style config and tensors in memory, same door."""
        weights = safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()})
        return self.put_files(
            name,
            json.dumps(config).encode(),
            weights,
            if_match=if_match,
            replace=replace,
            description=description,
            examples=examples,
            provenance=provenance or {"source": "generated"},
            expires=expires,
        )

    def put_source(
        self,
        name: str,
        uri: str,  # directory, file://, hf://org/repo[/sub][@rev], s3://, gs://, az://, https://
        *,
        if_match: str | None = None,
        replace: bool = True,
        description: str | None = None,
        examples: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> AdapterCard:
        """Fetches, checks and stores. Directories must lie inside ``allowed_roots``."""
        check_name(name)
        report = progress or (lambda stage, share: None)
        staged = self._files.stage()
        try:
            report("fetch", 0.0)
            fetched = fetch(uri, staged, self.allowed_roots, self.limits)
            report("check", 0.5)
            terms = _Terms(if_match, replace, description, tuple(examples), fetched.provenance)
            card = self._put_local(name, fetched.files, terms)
            report("done", 1.0)
            return card
        finally:
            self._files.discard(staged)

    def get(self, name: str) -> AdapterCard:
        """The card with its load report. Raises UnknownAdapter."""
        while True:
            self._check_open()
            record, content = self._index.current(name)
            try:
                report = self._catalogue.report(record.digest)
            except UnknownAdapter:
                if self._index.content(record.digest) is not None:
                    raise
                continue  # the name moved, and its old content went, between the two
            return self._card(record, content, report)

    def list(self) -> tuple[AdapterCard, ...]:
        """All cards by name, without their load reports."""
        cards = [self._card(record, content, None) for record, content in self._index.pairs()]
        return tuple(sorted(cards, key=lambda card: card.name))

    def revisions(self, name: str) -> tuple[AdapterCard, ...]:
        """What ``name`` can be asked for: the current revision, then kept ones, newest first.

        Without their load reports. Raises UnknownAdapter.
        """
        return tuple(
            self._card(record, content, None) for record, content in self._index.revisions(name)
        )

    def rollback(
        self, name: str, *, digest_prefix: str | None = None, if_match: str | None = None
    ) -> AdapterCard:
        """Makes a kept revision, by default the newest, the current one, under a new number.

        Raises UnknownAdapter, RevisionConflict, or InvalidSelector if no such revision is kept.
        """
        with self._writing:
            self._check_open()
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
            report = self._catalogue.report(content.digest)
            terms = _Terms(
                if_match, True, record.description, record.examples, record.provenance, None
            )
            put = self._point(name, content, report, terms)
        return self._card(put.record, content, report, current[0].digest)

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of every content the name ever had, oldest first."""
        return self._catalogue.history(name)

    def set_expiry(self, name: str, expires: float | None) -> AdapterCard:
        """``expires``: seconds since the epoch; a put of the name sets it anew."""
        with self._writing:
            self._check_open()
            record = self._catalogue.set_expiry(name, expires)
            self._index.update(record)
        return self.get(name)

    def next_expiry(self) -> float | None:
        """When the first name expires; None if none does, or the store is closed."""
        return None if self._closed else self._index.next_expiry()

    def expire(self, now: float) -> tuple[str, ...]:
        """Removes the names whose time has come. Their running requests finish."""
        with self._writing:
            if self._closed:
                return ()
            names = [record.name for record in self._index.expired(now)]
            for name in names:
                self.start_delete(name)
        return tuple(names)

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

    def acquire(self, selector: Selector | str) -> AdapterLease:
        """A lease on the content the selector means now; later changes of the name do not touch it.

        Loads to host memory on the calling thread if needed, once however many ask. Raises
        UnknownAdapter, InvalidSelector (descriptions and "auto" are resolved before), HostTierFull,
        or StoredAdapterDamaged.
        """
        wanted = parse_selector(selector) if isinstance(selector, str) else selector
        if isinstance(wanted, NameRef):
            return self._acquire_name(wanted)
        if isinstance(wanted, Mixture):
            return self._acquire_composite(Composite.of_mixture(wanted, self.base))
        if isinstance(wanted, Library):
            return self._acquire_composite(Composite.of_library(wanted, self._gate_of))
        raise InvalidSelector(
            f"{type(wanted).__name__} must be resolved to a name before it is used"
        )

    def check_known(self, ref: NameRef) -> None:
        """Raises UnknownAdapter where ``acquire`` would; loads nothing."""
        self._find(ref)

    def acquire_resident(self, ref: NameRef) -> AdapterLease | None:
        """``acquire`` where it needs no load, else None, also for what does not exist.

        Takes microseconds and never waits: an event loop may call it, and ask ``acquire`` on
        another thread when it gets None.
        """
        found = self._index.find(ref.name, ref.digest_prefix)
        if found is None:
            return None
        record, content = found
        plan = self._tier.lease_resident(content.digest)
        if plan is None:
            return None
        if self._index.content(content.digest) is None:  # retired between look-up and count
            self._released(content.digest)
            return None
        return AdapterLease(record.name, record.revision, plan, self._released)

    def pin(self, name: str) -> AdapterCard:
        """Loads the adapter and keeps it in host memory, also after a restart once it is used."""
        return self._set_pinned(name, pinned=True)

    def unpin(self, name: str) -> AdapterCard:
        return self._set_pinned(name, pinned=False)

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
        with self._writing:
            self._check_open()
            digest = self._index.current(name)[0].digest
            self._catalogue.remove_name(name, if_match)
            removed = self._index.remove_name(name)
            self._tier.pin(self._index.pinned_digests())
            deletion = Deletion(name, digest, self._tier.n_leases(digest))
            if removed.has_other_names:
                deletion.freed.set_result(TierBytes(0, 0))
            else:
                self._deletions.setdefault(digest, []).append(deletion.freed)
        for kept in removed.kept:
            self._retire_later(kept)
        self._retire(digest)  # nothing while it is leased
        return deletion

    def on_retired(self, listener: Callable[[str], None]) -> None:
        """``listener(digest)`` runs when no name and no lease reaches a digest any more.

        It runs on the thread that released or deleted it, must not block, and must not raise.
        """
        self._listeners = (*self._listeners, listener)

    def close(self) -> None:
        """Waits for running clean-up. Leased plans stay valid; the store answers StoreClosed."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
        self._janitor.shutdown(wait=True)
        self._catalogue.close()
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

    def _put_local(self, name: str, files: LocalFiles, terms: _Terms) -> AdapterCard:
        with files.open_weights() as weights:
            chunks = iter(lambda: weights.read(_CHUNK), b"")
            return self._put(name, AdapterFiles(files.config, chunks, files.chat_template), terms)

    def _put(self, name: str, files: AdapterFiles, terms: _Terms) -> AdapterCard:
        check_name(name)
        self._check_open()
        with ingest(files, self._files, self.base, self.limits) as ingested:
            prepared = self._loader.prepare(ingested.reading.plan)
            with self._writing:
                self._check_open()
                put, content = self._commit(name, ingested, terms)
                self._unservable.pop(content.digest, None)
                self._tier.hold(content.digest)  # a delete from here on waits for the rest
        try:
            self._keep_prepared(prepared)
            if self._tier.has_room(content.host_bytes):  # a new content is likely to be used
                self._tier.lease(content.digest, content.host_bytes, lambda: prepared)
                self._tier.release(content.digest)
        finally:
            self._let_go(content.digest)
        replaced = None if put.previous is None else put.previous.digest
        return self._card(put.record, content, ingested.reading.report, replaced)

    def _commit(self, name: str, ingested: Ingested, terms: _Terms) -> tuple[Put, Content]:
        """Publishes the files, then moves the name."""
        plan, report = ingested.reading
        found = self._index.find(name)
        current = None if found is None else found[0].digest
        if terms.if_match is not None and current != terms.if_match:  # before any file moves
            now = "does not exist" if current is None else f"has digest {current}"
            raise RevisionConflict(f"adapter {name!r} {now}, not {terms.if_match}", current)
        was_there = self._index.content(plan.digest) is not None
        n_bytes = self._files.publish(ingested.staged, plan.digest)
        content = Content(
            digest=plan.digest,
            family=_family(plan, terms.provenance),
            ranks=tuple(sorted({m.rank for m in plan.modules.values() if m.rank})),
            disk_bytes=n_bytes,
            host_bytes=plan.n_bytes,
            base_fingerprint=self.base.fingerprint,
            plan_sha256=ingested.plan_sha256,
        )
        try:
            return self._point(name, content, report, terms), content
        except RevisionConflict:
            if not was_there:
                self._files.remove(plan.digest)
            raise

    def _point(self, name: str, content: Content, report: LoadReport, terms: _Terms) -> Put:
        """Moves the name. Raises RevisionConflict."""
        put = self._catalogue.put(
            name,
            content,
            report,
            if_match=terms.if_match,
            replace=terms.replace,
            description=terms.description,
            examples=terms.examples,
            provenance=terms.provenance,
            created=time.time(),
            expires=terms.expires,
            n_kept=self._n_kept_revisions,
        )
        let_go = self._index.point(put, content)
        self._tier.pin(self._index.pinned_digests())
        for waiting in self._deletions.pop(content.digest, ()):  # it is named again: nothing goes
            waiting.set_result(TierBytes(0, 0))
        for digest in let_go:
            self._retire_later(digest)
        return put

    def _acquire_name(self, ref: NameRef) -> AdapterLease:
        record, content = self._hold(ref)
        try:
            plan = self._tier.lease(
                content.digest, content.host_bytes, lambda: self._loader.load(content)
            )
            return AdapterLease(record.name, record.revision, plan, self._released)
        except UnservableAdapter as error:
            self._unservable[content.digest] = str(error)
            raise
        finally:
            self._let_go(content.digest)

    def _find(self, ref: NameRef) -> tuple[NameRecord, Content]:
        self._check_open()
        found = self._index.find(ref.name, ref.digest_prefix)
        if found is None:
            revisions = self._index.revisions(ref.name)
            raise UnknownAdapter(str(ref), [f"{ref.name}@{r.digest[:12]}" for r, _ in revisions])
        return found

    def _keep_prepared(self, plan: AdapterPlan) -> None:
        """For loads to come. It is a cache: without it they take longer, no more."""
        if plan.packed_adapter is None:
            return
        try:
            staged = self._prepared.stage(plan)
            with self._writing:
                if self._index.content(plan.digest) is None:  # deleted meanwhile
                    self._prepared.discard(staged)
                else:
                    self._prepared.publish(staged, plan.digest)
        except OSError as error:
            _log.warning(
                "adapter %s is not kept in prepared form, its loads from disk take longer: %s",
                plan.digest[:12],
                error,
            )

    def _acquire_composite(self, composite: Composite) -> AdapterLease:
        """The files of the parts are held while the whole is built; it is cached as any content.

        The parts themselves do not come to host memory.
        """
        parts: list[Content] = []
        try:
            parts.extend(self._hold(ref)[1] for ref in composite.refs)
            digests = [part.digest for part in parts]
            digest = composite.identify(digests)
            self._index.add_composite(digest, digests)

            def load() -> AdapterPlan:
                return self._loader.load_composite(composite, parts, digest)

            plan = self._tier.lease(digest, sum(part.host_bytes for part in parts), load)
            return AdapterLease(composite.label, 0, plan, self._released)
        finally:
            for part in parts:
                self._let_go(part.digest)

    def _hold(self, ref: NameRef) -> tuple[NameRecord, Content]:
        """What ``ref`` means now; its files and its plan stay until ``_let_go``.

        The hold is counted first and looked up again then: ``_retire`` forgets a content only in a
        step in which nobody has it.
        """
        while True:
            record, content = self._find(ref)
            self._tier.hold(content.digest)
            if self._index.content(content.digest) is not None:
                return record, content
            self._let_go(content.digest)  # it was retired between look-up and count

    def _let_go(self, digest: str) -> None:
        self._tier.let_go(digest)
        self._retire_if_garbage(digest)

    def _released(self, digest: str) -> None:
        self._tier.release(digest)
        self._retire_if_garbage(digest)

    def _retire_if_garbage(self, digest: str) -> None:
        if not self._index.is_reachable(digest):
            self._retire_later(digest)

    def _set_pinned(self, name: str, *, pinned: bool) -> AdapterCard:
        self._check_open()
        with self._writing:
            self._index.update(self._catalogue.set_pinned(name, pinned=pinned))
            self._tier.pin(self._index.pinned_digests())
        return self.warm(name) if pinned else self.get(name)

    def _retire_later(self, digest: str) -> None:
        self._later(self._retire, digest)

    def _later(self, work: Callable[[_T], object], item: _T) -> None:
        try:
            self._janitor.submit(work, item)
        except RuntimeError:  # closed: the next start sweeps
            return

    def _retire(self, digest: str) -> TierBytes:
        """Frees a digest that nothing reaches. Does nothing if something does by now."""
        with self._writing:
            removed = self._index.remove_unreachable(
                digest, is_used=lambda: self._tier.n_leases(digest) > 0
            )
            if removed is None:
                if not self._index.knows(digest):  # a plan leased while its content was retired
                    self._tier.drop(digest)
                return TierBytes(0, 0)
            host = self._tier.drop(digest)
            disk = 0
            if removed.content is not None and not self._closed:
                disk = self._files.remove(digest) + self._prepared.remove(digest)
                self._catalogue.forget_content(digest)
            deletions = self._deletions.pop(digest, ())
        for listener in self._listeners:
            listener(digest)
        host += sum(self._retire(composite).host for composite in removed.composites)
        freed = TierBytes(disk, host)
        for waiting in deletions:
            waiting.set_result(freed)
        return freed

    def _sweep(self) -> None:
        """After a crash: files without a catalogue entry, and contents that no name reaches."""
        for files in (self._files, self._prepared):
            for digest in tuple(files.digests()):
                if not self._index.is_named(digest):
                    files.remove(digest)
        for content in self._index.contents():
            if not self._index.is_named(content.digest):
                self._catalogue.forget_content(content.digest)
                self._index.remove_unreachable(content.digest)
        self._tier.pin(self._index.pinned_digests())

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
            expires=record.expires,
            replaced=replaced,
            unservable=self._unservable.get(record.digest),
        )

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the adapter store is closed")


def _family(plan: AdapterPlan, provenance: Mapping[str, JsonValue]) -> Family:
    return Family.GENERATED if provenance.get("source") == "generated" else plan.family


def _chunks(weights: bytes | Path) -> Iterator[bytes]:
    if isinstance(weights, bytes):
        for start in range(0, len(weights), _CHUNK):
            yield weights[start : start + _CHUNK]
        return
    with weights.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK), b"")
