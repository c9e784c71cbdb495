"""The adapter store: names, contents, leases. Synchronous and thread-safe.

Adding, loading and deleting an adapter happen on the calling thread: call from a worker thread, not
from an event loop. ``acquire`` of a resident adapter takes microseconds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
from torch import Tensor

from loraplex_adapter_store.sources.local import read_directory

from .adapter_importer import AdapterFiles, AdapterImporter, Progress, WithCard
from .base_spec import BaseSpec
from .cards import Cards
from .catalogue.catalogue import Catalogue
from .catalogue.catalogue_registry import CatalogueRegistry
from .catalogue.freshness import CatalogueLimits, Freshness
from .catalogue.shared_contents import LocalContents, SharedContents
from .composites.composite import GateOf
from .content_loader import ContentLoader, PlanCheck
from .contents.content_files import ContentFiles, Disk, lock_directory
from .contents.packed_files import PackedFiles, Packer
from .errors import AdapterInUse, AdapterPinned, StoreError
from .garbage_collector import Deletion, GarbageCollector
from .leasing import AdapterLease, Leasing
from .limits import StoreLimits
from .name_changes import NameChanges
from .names.card import AdapterCard, CardEdit, DeleteReport, StoreStats, TierBytes
from .names.expected_names import ExpectedNames
from .names.name_index import NameIndex
from .names.name_registry import REGISTRY_FILE, NameRegistry, SqliteRegistry
from .names.name_syntax import check_name, tenant_of
from .names.put_options import NO_QUOTA, PutOptions, Quota
from .names.selector import NameRef, Selector, parse_selector
from .report import JsonValue
from .store_state import StoreState
from .tiers.host_tier import HostTier


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """The engine's functions that the store calls. Without hooks, plans are stored as folded.

    ``packer`` makes the form that the host tier keeps, and refuses a plan that the engine cannot
    serve before anything is stored. Its methods run on the thread that adds or loads the adapter.
    """

    packer: Packer | None = None
    check: PlanCheck | None = None  # refuses plans in a store without an engine
    gate_of: GateOf | None = None  # makes the gates of libraries; None: libraries are refused


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
        disk: Disk | None = None,
        engine: EngineHooks = EngineHooks(),
        n_kept_revisions: int = 0,
        catalogue: Catalogue | None = None,
        catalogue_limits: CatalogueLimits = CatalogueLimits(),  # noqa: B008  frozen value
    ) -> None:
        """Open or create the store below ``root``.

        ``n_kept_revisions`` older contents of each name are kept until the name is deleted. Clients
        ask for them by digest, or roll back to them.

        With a ``catalogue``, names and contents live there, for all servers that share it; ``root``
        caches what this server uses. Unless their text says otherwise, methods then block for the
        network and may raise CatalogueUnavailable.
        """
        self.base = base
        self.expected = ExpectedNames()
        self.root = root
        self.limits = limits
        self.allowed_roots = tuple(path.resolve() for path in allowed_roots)
        disk = disk or Disk()
        disk.make_directory(root)
        with ExitStack() as opened:
            self._release_root = lock_directory(root)
            opened.callback(self._release_root)
            # The catalogue's contents lie in a folder of their own: they are swept by other names.
            folder = root if catalogue is None else root / "catalogue-cache"
            files, packed = ContentFiles(folder, disk), PackedFiles(folder, disk, engine.packer)
            tier = HostTier(host_bytes, limits.host_wait_s)
            if catalogue is None:
                registry: NameRegistry = _open_registry(root, files)
            else:
                freshness = Freshness(catalogue_limits)
                shared = SharedContents(catalogue.contents, freshness)
                registry = CatalogueRegistry(catalogue, freshness, shared, catalogue_limits.poll_s)
            self.state = state = StoreState(
                base, limits, registry, NameIndex(), files, packed, tier
            )
            local = None
            if catalogue is not None:
                local = LocalContents(shared, state, catalogue_limits.disk_bytes)
            opened.pop_all()
        self.cards, self.garbage = cards, garbage = Cards(state), GarbageCollector(state)
        self.loader = loader = ContentLoader(state, garbage, engine.packer, engine.check, local)
        self.leases = Leasing(state, loader, garbage, cards, local, engine.gate_of)
        self._changes = changes = NameChanges(state, garbage, cards, n_kept_revisions)
        self._importer = AdapterImporter(state, loader, garbage, changes, cards, local)
        if registry.start(changes.apply):
            garbage.sweep()
        cards.check_stored(loader)

    def put_directory(
        self,
        name: str,
        path: Path,
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
    ) -> AdapterCard:
        """Add a PEFT directory of the operator. See ``put_source`` for paths from clients.

        Raises AdapterRefused, RevisionConflict, InvalidName or SourceError; then nothing changed.
        """
        source: dict[str, JsonValue] = {"source": "directory", "path": str(path)}
        files = read_directory(path, self.limits)
        return self._importer.put_local(name, files, options, source)

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
        """Add an upload: the text of adapter_config.json and the safetensors bytes or file.

        ``weights``: a path must lie in a folder of ``upload_folder``, and the file must not change.
        ``companions``: the files of ``companion_files`` that the upload has, by name. Raises
        AdapterRefused, RevisionConflict or QuotaExceeded; then nothing changed.
        """
        stored = [weights] if isinstance(weights, bytes) else weights
        files = AdapterFiles(config, stored, chat_template, companions)
        return self._importer.put(name, files, options, {"source": "upload"})

    def upload_folder(self) -> AbstractContextManager[Path]:
        """An empty directory on the store's disk for an upload, deleted at the end."""
        return self.state.files.staging_folder()

    def put_tensors(
        self,
        name: str,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
    ) -> AdapterCard:
        """Add a generated adapter: a PEFT config and tensors in memory, with the same checks."""
        weights = safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()})
        files = AdapterFiles(json.dumps(config).encode(), [weights], None)
        return self._importer.put(name, files, options, {"source": "generated"})

    def put_stored(self, name: str, digest: str, options: PutOptions) -> AdapterCard | None:
        """Point a name at a content that the store has for this base; None if it has none.

        Stores that share a catalogue always return None: another server may delete the content.
        Raises RevisionConflict or QuotaExceeded; then nothing changed.
        """
        return self._importer.put_stored(name, digest, options)

    def put_source(
        self,
        name: str,
        uri: str,  # directory, file://, hf://org/repo[/sub][@rev], s3://, gs://, az://, https://
        *,
        options: PutOptions = PutOptions(),  # noqa: B008  frozen value
        progress: Progress | None = None,
        with_card: WithCard | None = None,
    ) -> AdapterCard:
        """Fetch, check and store an adapter. Directories must lie inside ``allowed_roots``.

        ``with_card`` adds the contents of the source's card.json, if any, to the options.
        """
        report = progress or (lambda stage, share: None)
        return self._importer.put_source(name, uri, self.allowed_roots, options, report, with_card)

    def get(self, name: str) -> AdapterCard:
        """Return the card with its load report. Raises UnknownAdapter."""
        self.state.registry.follow(name)
        self.state.check_open()
        return self.cards.get(name)

    def has_name(self, name: str) -> bool:
        """Return True if the name existed at the last ``follow``. Never waits."""
        return self.state.index.has(name)

    @property
    def is_shared(self) -> bool:
        """True if the store has a catalogue, so that its methods wait for the network."""
        return self.state.registry.is_shared

    def is_fresh(self, name: str) -> bool:
        """True if ``has_name`` is up to date. Takes a microsecond and never waits."""
        return self.state.registry.is_fresh(name)

    def follow(self, names: Iterable[str]) -> None:
        """Bring these names up to date with the catalogue, if there is one."""
        for name in names:
            self.state.registry.follow(name)

    def check_quota(self, name: str, quota: Quota) -> None:
        """Raises QuotaExceeded if a put of ``name`` would make too many names.

        A put checks the quota again, atomically with the change. This call spares earlier work.
        """
        if quota.max_adapters is not None:
            self.state.registry.refresh_tenant(tenant_of(name))
            names = self.state.index.of_tenant(tenant_of(name))
            quota.check_adapters(len({*names, name}))

    def count_bytes_of(self, other_bytes: Callable[[str], int]) -> None:
        """Count other bytes of a tenant against ``max_bytes``, too. Any thread may ask for them."""
        self._changes.count_bytes_of(other_bytes)

    def n_bytes_beside(self, tenant: str, name: str | None) -> int:
        """Return the bytes that ``max_bytes`` counts, without the revisions of ``name``."""
        return self._changes.n_bytes_beside(tenant, name)

    def list(self) -> tuple[AdapterCard, ...]:
        """Return all cards, sorted by name, without load reports."""
        self.state.registry.follow_all()
        return self.cards.all()

    def revisions(self, name: str) -> tuple[AdapterCard, ...]:
        """Return the current revision of ``name``, then the kept ones, newest first.

        The cards have no load reports. Raises UnknownAdapter.
        """
        self.state.registry.follow(name)
        return self.cards.revisions(name)

    def rollback(
        self, name: str, *, digest_prefix: str | None = None, if_match: str | None = None
    ) -> AdapterCard:
        """Make a kept revision, by default the newest, the current one, under a new number.

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
        """Replace the card of a name; ``change`` gets the present card.

        ``if_match``: the ETag that the card must have. Raises UnknownAdapter, RevisionConflict or
        an error of ``change``; then nothing changed.
        """
        return self._changes.edit(name, change, if_match)

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """Return (revision, digest, created) of every content the name ever had, oldest first."""
        return self.state.registry.history(name)

    def set_expiry(self, name: str, expires: float | None) -> AdapterCard:
        """Set the expiry in seconds since the epoch. A put of the name replaces it."""
        self._changes.set_expiry(name, expires)
        return self.get(name)

    def next_expiry(self) -> float | None:
        """Return when the first name expires; None if none does, or the store is closed."""
        return None if self._is_closed else self.state.index.next_expiry()

    def expire(self, now: float) -> tuple[str, ...]:
        """Delete the names that have expired, and return them. Their running requests finish."""
        return () if self._is_closed else self._changes.expire(now)

    def stats(self) -> StoreStats:
        return self.cards.stats()

    def acquire(
        self,
        selector: Selector | str,
        cancelled: threading.Event | None = None,
        *,
        tenant: str = "",
    ) -> AdapterLease:
        """Lease the content that the selector means now. Later changes of the name do not matter.

        Loads the content to host memory on the calling thread if needed, once for all requesters.
        Raises UnknownAdapter, InvalidSelector (descriptions and "auto" are resolved before),
        LimitExceeded if host memory can never hold the plan, HostTierFull or StoredAdapterDamaged.

        ``cancelled`` ends a fetch from the catalogue, or a wait for memory, within seconds with
        LoadCancelled. The memory of a mixture counts as ``tenant``'s, that of an adapter as its
        owner's. The plans that a ``tenant`` uses at once have a limit, but for the operator's, "".
        """
        parsed = parse_selector(selector) if isinstance(selector, str) else selector
        return self.leases.acquire(parsed, cancelled, tenant=tenant)

    def pin(self, name: str, quota: Quota = NO_QUOTA) -> AdapterCard:
        """Load the adapter and keep it in host memory. After a restart, the first use loads it.

        Raises UnknownAdapter, QuotaExceeded and the errors of ``acquire``.
        """
        self._changes.set_pinned(name, pinned=True, quota=quota)
        self.acquire(NameRef(check_name(name))).release()
        return self.get(name)

    def unpin(self, name: str) -> AdapterCard:
        self._changes.set_pinned(name, pinned=False, quota=NO_QUOTA)
        return self.get(name)

    def unload(self, name: str) -> AdapterCard:
        """Remove the adapter from host memory. The next use loads it again from its files.

        Memory is by content: other names of the same content are unloaded, too; mixtures are
        contents of their own. Raises UnknownAdapter, AdapterPinned or AdapterInUse; then nothing
        changed.
        """
        card = self.get(name)
        pinned = self.state.index.pinned_as(name)
        if pinned is not None:
            raise AdapterPinned(name, pinned)
        n_uses = self.unload_digest(card.digest)
        if n_uses:
            raise AdapterInUse(name, n_uses)
        return self.get(name)

    def unload_digest(self, digest: str) -> int:
        """Remove an idle content from host memory, and return the number of uses that keep it.

        Takes microseconds. A pinned content stays.
        """
        return self.state.tier.unload(digest)

    def delete(
        self, name: str, *, if_match: str | None = None, timeout_s: float = 30.0
    ) -> DeleteReport:
        """Delete the name at once, wait for running leases, and report the freed bytes.

        After the timeout the report says ``drained=False``; the last lease then frees the bytes.
        """
        deletion = self.start_delete(name, if_match=if_match)
        try:
            freed: TierBytes | None = deletion.freed.result(timeout_s)
        except TimeoutError:
            freed = None
        return deletion.report(freed)

    def start_delete(self, name: str, *, if_match: str | None = None) -> Deletion:
        """Delete the name and do not wait; ``freed`` completes with the last lease."""
        return self._changes.delete(name, if_match=if_match)

    def on_retired(self, listener: Callable[[str], None]) -> None:
        """Call ``listener(digest)`` when a digest has lost its last name and its last lease.

        It runs on the thread that released or deleted the content. It must not block or raise.
        """
        self.garbage.listen(listener)

    def on_pinned(self, listener: Callable[[frozenset[str]], None]) -> None:
        """Call ``listener(digests)`` with all pinned digests, now and after each change of a name.

        It runs on the thread that changed the name, one call at a time. It must not block or raise.
        """
        self._changes.listen_to_pins(listener)

    def close(self) -> None:
        """Finish running clean-up. Leased plans stay valid; later calls raise StoreClosed."""
        with self.state.writing:
            if self._is_closed:
                return
            self.state.closed.set()
        self.garbage.close()
        self.state.registry.close()
        self._release_root()

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _is_closed(self) -> bool:
        return self.state.closed.is_set()


def _open_registry(root: Path, files: ContentFiles) -> SqliteRegistry:
    path = root / REGISTRY_FILE
    if any(files.digests()) and not (path.exists() and path.stat().st_size):
        raise StoreError(  # all files would be swept
            f"{path} is missing, but files of adapters are there: restore it from a backup, or "
            "set the files aside with `loraplex adapters verify --repair`"
        )
    return SqliteRegistry(path)
