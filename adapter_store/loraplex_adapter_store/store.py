"""The adapter store: names, contents, leases. Synchronous and thread-safe.

Reading an adapter in, loading it to memory and deleting it happen on the calling thread: call from
a worker thread, not from an event loop. ``acquire`` of a resident adapter takes microseconds.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import safetensors.torch
from torch import Tensor

from .adapter_config import AdapterConfig
from .base_spec import BaseSpec
from .card import AdapterCard, DeleteReport, StoreStats, TierBytes
from .catalogue import Catalogue, Content, NameRecord
from .content_files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
    ContentFiles,
)
from .disk import Disk
from .door import TensorFile
from .errors import (
    BaseMismatch,
    InvalidSelector,
    LimitExceeded,
    RevisionConflict,
    StoreClosed,
    StoreError,
    UnknownAdapter,
)
from .eviction import POLICIES
from .host_tier import HostTier
from .library import GateOf, library_digest, library_plan
from .limits import StoreLimits
from .mixture import mix_plans, mixture_digest
from .names import check_name
from .plan import AdapterPlan, Family
from .plan_file import pack_plan, read_plan
from .reader import Reading, read_adapter
from .report import JsonValue
from .selector import Library, Mixture, NameRef, Selector, parse_selector
from .sources.local import LocalFiles, read_directory
from .sources.uri import fetch

__all__ = ["AdapterLease", "AdapterStore", "Progress"]

Progress = Callable[[str, float], None]  # stage, share done in [0, 1]

_CHUNK = 1 << 20


class AdapterLease:
    """The right to use one content while a request runs. Release it, or use ``with``.

    ``revision`` is 0 for a mixture; its ``name`` is the mixture in words.
    """

    __slots__ = ("_on_release", "_released", "digest", "name", "plan", "revision")

    def __init__(
        self, name: str, revision: int, plan: AdapterPlan, on_release: Callable[[str], None]
    ) -> None:
        self.name = name
        self.digest = plan.digest
        self.revision = revision
        self.plan = plan
        self._on_release = on_release
        self._released = threading.Lock()

    def release(self) -> None:
        """Gives the lease back; later calls do nothing. Any thread, never blocks."""
        if self._released.acquire(blocking=False):
            self._on_release(self.digest)

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


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
        pin_memory: bool = False,  # page-locked host memory, for a GPU's copy engine
        disk: Disk | None = None,
        gate_of: GateOf | None = None,
    ) -> None:
        """``gate_of`` makes the gates of libraries; without it they are refused."""
        self.base = base
        self.limits = limits
        self.allowed_roots = tuple(path.resolve() for path in allowed_roots)
        self._pin_memory = pin_memory
        self._gate_of = gate_of
        disk = disk or Disk()
        disk.make_directory(root)
        self._guard = _own(root)
        try:
            self._files = ContentFiles(root, disk)
            self._catalogue = Catalogue(root / "catalogue.sqlite3")
        except BaseException:
            self._guard()
            raise
        self._tier = HostTier(host_bytes, POLICIES[eviction], limits.host_wait_s)
        self._writing = threading.RLock()  # serialises changes of names and files
        self._lock = threading.RLock()  # guards the fields below; never held during I/O
        self._names: dict[str, NameRecord] = {r.name: r for r in self._catalogue.names()}
        self._contents: dict[str, Content] = {c.digest: c for c in self._catalogue.contents()}
        self._awaited: set[str] = set()  # digests whose delete waits, and will retire them itself
        self._mixtures: dict[str, tuple[str, ...]] = {}  # digest of a mixture → its parts'
        self._listeners: list[Callable[[str], None]] = []
        self._janitor = ThreadPoolExecutor(1, thread_name_prefix="adapter-janitor")
        self._closed = False
        self._sweep()

    # -- putting

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
        files = read_directory(path, self.limits)
        provenance: dict[str, JsonValue] = {"source": "directory", "path": str(path)}
        return self._put_local(
            name,
            files,
            if_match=if_match,
            replace=replace,
            description=description,
            examples=examples,
            provenance=provenance,
        )

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
    ) -> AdapterCard:
        """For uploads: the text of adapter_config.json and the safetensors bytes or file."""
        return self._put(
            name,
            config,
            _chunks(weights),
            chat_template,
            if_match=if_match,
            replace=replace,
            description=description,
            examples=tuple(examples),
            provenance=dict(provenance or {"source": "upload"}),
        )

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
            card = self._put_local(
                name,
                fetched.files,
                if_match=if_match,
                replace=replace,
                description=description,
                examples=examples,
                provenance=fetched.provenance,
            )
            report("done", 1.0)
            return card
        finally:
            self._files.discard(staged)

    # -- reading

    def get(self, name: str) -> AdapterCard:
        """The card with its load report. Raises UnknownAdapter."""
        record, content = self._current(name)
        return self._card(record, content, with_report=True)

    def list(self) -> tuple[AdapterCard, ...]:
        """All cards by name, without their load reports."""
        with self._lock:
            pairs = [(record, self._contents[record.digest]) for record in self._names.values()]
        cards = [self._card(record, content, with_report=False) for record, content in pairs]
        return tuple(sorted(cards, key=lambda card: card.name))

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of every content the name ever had, oldest first."""
        return self._catalogue.history(name)

    def stats(self) -> StoreStats:
        tier = self._tier.stats()
        with self._lock:
            return StoreStats(
                n_adapters=len(self._names),
                n_digests=len(self._contents),
                n_leases=tier.n_leases,
                disk_bytes=sum(content.disk_bytes for content in self._contents.values()),
                host_bytes_used=tier.bytes_used,
                host_bytes_total=tier.bytes_total,
                n_host_plans=tier.n_plans,
                n_host_hits=tier.n_hits,
                n_host_loads=tier.n_loads,
                n_host_evictions=tier.n_evictions,
                load_seconds=tier.load_seconds,
            )

    # -- using

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
            return self._acquire_mixture(wanted)
        if isinstance(wanted, Library):
            return self._acquire_library(wanted)
        raise InvalidSelector(
            f"{type(wanted).__name__} must be resolved to a name before it is used"
        )

    def acquire_resident(self, ref: NameRef) -> AdapterLease | None:
        """``acquire`` where it needs no load, else None, also for what does not exist.

        Takes microseconds and never waits: an event loop may call it, and ask ``acquire`` on
        another thread when it gets None.
        """
        with self._lock:
            record = self._names.get(ref.name)
            if record is None or not record.digest.startswith(ref.digest_prefix or ""):
                return None
            plan = self._tier.lease_resident(record.digest)
        if plan is None:
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

    # -- removing

    def delete(
        self, name: str, *, if_match: str | None = None, timeout_s: float = 30.0
    ) -> DeleteReport:
        """Takes the name away at once, waits for running leases, frees the bytes and counts them.

        After the timeout the report says ``drained=False``; the rest goes with the last lease.
        """
        self._check_open()
        with self._writing:
            record, _ = self._current(name)
            self._catalogue.remove_name(name, if_match)
            with self._lock:
                del self._names[name]
                shared = self._is_named(record.digest)
                if not shared:
                    self._awaited.add(record.digest)
            self._pin_now()
        if shared:
            return DeleteReport(name, record.digest, True, 0, TierBytes(0, 0))
        n_leases = self._tier.n_leases(record.digest)
        try:
            drained = self._tier.wait_unleased(record.digest, timeout_s)
        finally:
            with self._lock:
                self._awaited.discard(record.digest)
        freed = self._retire(record.digest)  # nothing while it is leased
        return DeleteReport(name, record.digest, drained, n_leases, freed)

    def on_retired(self, listener: Callable[[str], None]) -> None:
        """``listener(digest)`` runs when no name and no lease reaches a digest any more.

        It runs on the thread that released or deleted it, must not block, and must not raise.
        """
        with self._lock:
            self._listeners.append(listener)

    def close(self) -> None:
        """Waits for running clean-up. Leased plans stay valid; the store answers StoreClosed."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
        self._janitor.shutdown(wait=True)
        self._catalogue.close()
        self._guard()

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- private: putting

    def _put_local(
        self,
        name: str,
        files: LocalFiles,
        *,
        if_match: str | None,
        replace: bool,
        description: str | None,
        examples: Sequence[str],
        provenance: Mapping[str, JsonValue],
    ) -> AdapterCard:
        with files.open_weights() as weights:
            return self._put(
                name,
                files.config,
                iter(lambda: weights.read(_CHUNK), b""),
                files.chat_template,
                if_match=if_match,
                replace=replace,
                description=description,
                examples=tuple(examples),
                provenance=dict(provenance),
            )

    def _put(
        self,
        name: str,
        config_text: bytes,
        weights: Iterable[bytes],
        chat_template: str | None,
        *,
        if_match: str | None,
        replace: bool,
        description: str | None,
        examples: tuple[str, ...],
        provenance: Mapping[str, JsonValue],
    ) -> AdapterCard:
        check_name(name)
        self._check_open()
        config = AdapterConfig.parse(config_text, self.limits)
        with self._staged() as staged:
            self._write_staged(staged, config_text, weights, chat_template)
            with TensorFile(staged / WEIGHTS_FILE, self.limits) as tensors:
                reading = read_adapter(
                    config, tensors, self.base, self.limits, chat_template=chat_template
                )
            packed = pack_plan(reading.plan)
            self._files.write(staged / PLAN_FILE, packed.chunks)
            with self._writing:
                self._check_open()
                record, previous = self._commit(
                    name,
                    staged,
                    reading,
                    packed.sha256,
                    if_match,
                    replace,
                    description,
                    examples,
                    provenance,
                )
        self._keep_if_room(record.digest)
        if previous is not None and previous != record.digest:
            self._retire_later(previous)
        return self.get(name)

    def _write_staged(
        self, staged: Path, config: bytes, weights: Iterable[bytes], template: str | None
    ) -> None:
        limit = self.limits.max_file_bytes

        def counted() -> Iterator[bytes]:
            n_bytes = 0
            for chunk in weights:
                n_bytes += len(chunk)
                if n_bytes > limit:
                    raise LimitExceeded(f"the weights exceed {limit} bytes")
                yield chunk

        self._files.write(staged / CONFIG_FILE, [config])
        self._files.write(staged / WEIGHTS_FILE, counted())
        if template is not None:
            self._files.write(staged / CHAT_TEMPLATE_FILE, [template.encode()])

    def _commit(
        self,
        name: str,
        staged: Path,
        reading: Reading,
        plan_sha256: str,
        if_match: str | None,
        replace: bool,
        description: str | None,
        examples: tuple[str, ...],
        provenance: Mapping[str, JsonValue],
    ) -> tuple[NameRecord, str | None]:
        """Publishes the files, then moves the name. Returns the record and the previous digest."""
        plan, report = reading
        with self._lock:
            known = self._names.get(name)
            previous = None if known is None else known.digest
            had_content = plan.digest in self._contents
        if if_match is not None and previous != if_match:
            now = "does not exist" if previous is None else f"has digest {previous}"
            raise RevisionConflict(f"adapter {name!r} {now}, not {if_match}", previous)
        n_bytes = self._files.publish(staged, plan.digest)
        content = Content(
            digest=plan.digest,
            family=_family(plan, provenance),
            ranks=tuple(sorted({m.rank for m in plan.modules.values() if m.rank})),
            disk_bytes=n_bytes,
            host_bytes=plan.n_bytes,
            base_fingerprint=self.base.fingerprint,
            plan_sha256=plan_sha256,
        )
        try:
            record = self._catalogue.put(
                name,
                content,
                report,
                if_match=if_match,
                replace=replace,
                description=description,
                examples=examples,
                provenance=provenance,
                created=time.time(),
            )
        except RevisionConflict:
            if not had_content:
                self._files.remove(plan.digest)
            raise
        with self._lock:
            self._names[name] = record
            self._contents[plan.digest] = content
        self._pin_now()
        return record, previous

    def _keep_if_room(self, digest: str) -> None:
        """A new content is likely to be used: loaded now unless somebody would have to leave."""
        with self._lock:
            content = self._contents.get(digest)
        if content is not None and self._tier.has_room(content.host_bytes):
            self._lease(content)
            self._released(digest)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        staged = self._files.stage()
        try:
            yield staged
        finally:
            self._files.discard(staged)

    # -- private: using

    def _acquire_name(self, ref: NameRef) -> AdapterLease:
        while True:
            record, content = self._current(ref.name)
            if ref.digest_prefix and not record.digest.startswith(ref.digest_prefix):
                raise UnknownAdapter(str(ref), (f"{ref.name}@{record.digest[:12]}",))
            plan = self._lease(content)
            with self._lock:
                # The name may have moved, and its old files gone, between look-up and lease.
                if content.digest in self._contents:
                    return AdapterLease(record.name, record.revision, plan, self._released)
            self._released(content.digest)

    def _lease(self, content: Content) -> AdapterPlan:
        return self._tier.lease(content.digest, content.host_bytes, lambda: self._load(content))

    def _load(self, content: Content) -> AdapterPlan:
        """From disk, with every byte checked. Mostly outside the interpreter lock."""
        path = self._files.path(content.digest)
        if content.base_fingerprint != self.base.fingerprint:
            raise BaseMismatch(
                f"adapter {content.digest[:12]} was checked against another base than "
                f"{self.base.model_id}; add it again"
            )
        return read_plan(path / PLAN_FILE, content.plan_sha256, pin_memory=self._pin_memory)

    def _acquire_mixture(self, mixture: Mixture) -> AdapterLease:
        leases = self._acquire_all([part.ref for part in mixture.parts])
        try:
            weights = [part.weight for part in mixture.parts]
            digests = [lease.digest for lease in leases]
            digest = mixture_digest(list(zip(digests, weights, strict=True)))
            parts = [(lease.plan, w) for lease, w in zip(leases, weights, strict=True)]
            n_bytes = sum(plan.n_bytes for plan, _ in parts)
            with self._lock:
                self._mixtures[digest] = tuple(digests)
            plan = self._tier.lease(digest, n_bytes, lambda: mix_plans(parts, self.base, digest))
            return AdapterLease(str(mixture), 0, plan, self._released)
        finally:
            for lease in leases:
                lease.release()

    def _acquire_all(self, refs: Sequence[NameRef]) -> list[AdapterLease]:
        """All of them, or none."""
        leases: list[AdapterLease] = []
        try:
            for ref in refs:
                leases.append(self._acquire_name(ref))
        except BaseException:
            for lease in leases:
                lease.release()
            raise
        return leases

    def _acquire_library(self, library: Library) -> AdapterLease:
        gate_of = self._gate_of
        if gate_of is None:
            raise InvalidSelector("this store has no gates for libraries (arrow)")
        leases = self._acquire_all(library.refs)
        try:
            plans = [lease.plan for lease in leases]
            digests = [plan.digest for plan in plans]
            k, temperature = library.top_k, library.temperature
            digest = library_digest(digests, k, temperature)
            with self._lock:
                self._mixtures[digest] = tuple(digests)
            plan = self._tier.lease(
                digest,
                sum(plan.n_bytes for plan in plans),
                lambda: library_plan(plans, digest, k, temperature, gate_of),
            )
            return AdapterLease(str(library), 0, plan, self._released)
        finally:
            for lease in leases:
                lease.release()

    def _released(self, digest: str) -> None:
        self._tier.release(digest)
        with self._lock:
            is_garbage = not self._is_reachable(digest) and digest not in self._awaited
        if is_garbage:
            self._retire_later(digest)

    def _set_pinned(self, name: str, *, pinned: bool) -> AdapterCard:
        self._check_open()
        with self._writing:
            record, _ = self._current(name)
            record = self._catalogue.set_pinned(name, pinned=pinned)
            with self._lock:
                self._names[name] = record
            self._pin_now()
        return self.warm(name) if pinned else self.get(name)

    def _pin_now(self) -> None:
        with self._lock:
            pinned = frozenset(r.digest for r in self._names.values() if r.pinned)
        self._tier.pin(pinned)

    # -- private: retiring

    def _retire_later(self, digest: str) -> None:
        try:
            self._janitor.submit(self._retire, digest)
        except RuntimeError:  # closed: the next start sweeps
            return

    def _retire(self, digest: str) -> TierBytes:
        """Frees a digest that nothing reaches. Does nothing if something does by now."""
        with self._writing:
            with self._lock:
                if self._is_reachable(digest) or self._tier.n_leases(digest) > 0:
                    return TierBytes(0, 0)
                content = self._contents.pop(digest, None)
                mixed = [m for m, parts in self._mixtures.items() if digest in parts]
                was_mixture = self._mixtures.pop(digest, None) is not None
            if content is None and not was_mixture:
                return TierBytes(0, 0)
            host = self._tier.drop(digest)
            disk = 0
            if content is not None and not self._closed:
                disk = self._files.remove(digest)
                self._catalogue.forget_content(digest)
        self._notify(digest)
        for mixture in mixed:
            host += self._retire(mixture).host
        return TierBytes(disk, host)

    def _is_named(self, digest: str) -> bool:
        return any(record.digest == digest for record in self._names.values())

    def _is_reachable(self, digest: str) -> bool:
        """By a current name; for a mixture, if all its parts are. Under the lock."""
        parts = self._mixtures.get(digest)
        if parts is not None:
            return all(self._is_named(part) for part in parts)
        return self._is_named(digest)

    def _notify(self, digest: str) -> None:
        with self._lock:
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(digest)

    def _sweep(self) -> None:
        """After a crash: files without a catalogue entry, and contents that no name reaches."""
        for digest in list(self._files.digests()):
            if digest not in self._contents or not self._is_named(digest):
                self._files.remove(digest)
        for digest in list(self._contents):
            if not self._is_named(digest):
                self._catalogue.forget_content(digest)
                del self._contents[digest]
        self._pin_now()

    # -- private: reading

    def _current(self, name: str) -> tuple[NameRecord, Content]:
        self._check_open()
        with self._lock:
            record = self._names.get(name)
            if record is not None:
                return record, self._contents[record.digest]
            names = list(self._names)
        raise UnknownAdapter(name, difflib.get_close_matches(name, names, 5, 0.5), len(names))

    def _card(self, record: NameRecord, content: Content, *, with_report: bool) -> AdapterCard:
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
            report=self._catalogue.report(record.digest) if with_report else None,
            provenance=record.provenance,
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


def _own(root: Path) -> Callable[[], None]:
    """Takes the lock of the directory; returns what gives it back."""
    file = (root / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"{root} is in use by another process; talk to the running server with --url"
        ) from None
    return file.close
