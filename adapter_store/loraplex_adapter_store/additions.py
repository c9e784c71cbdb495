"""Adding an adapter: its files are read and checked, then published, then a name points at them."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from loraplex_adapter_store.sources.local import LocalFiles, read_card, read_directory
from loraplex_adapter_store.sources.uri import fetch

from .base_spec import BaseSpec
from .card import AdapterCard
from .cards import Cards
from .catalogue.local_contents import LocalContents
from .catalogue.shared_contents import SharedContents
from .content_files import ContentFiles
from .content_loader import ContentLoader
from .errors import StoreError
from .host_tier import HostTier
from .ingest import AdapterFiles, Ingested, chunks_of, ingest
from .limits import StoreLimits
from .name_changes import NameChanges
from .name_index import NameIndex
from .name_record import Content, Put
from .name_refresh import NameRefresh
from .names import check_name, tenant_of
from .packed_plans import PackedPlans
from .plan import AdapterPlan, Family
from .put_options import PutOptions
from .report import JsonValue
from .retirement import Retirement

__all__ = ["Additions", "Progress", "WithCard"]

Progress = Callable[[str, float], None]  # stage, share done in [0, 1]
WithCard = Callable[[bytes, PutOptions], PutOptions]  # what a source's card.json adds


class Additions:
    """Thread-safe; all work is done on the calling thread."""

    def __init__(
        self,
        base: BaseSpec,
        limits: StoreLimits,
        files: ContentFiles,
        packed: PackedPlans,
        index: NameIndex,
        tier: HostTier,
        loader: ContentLoader,
        retirement: Retirement,
        changes: NameChanges,
        cards: Cards,
        writing: threading.RLock,
        refresh: NameRefresh,
        shared: SharedContents | None,
        local: LocalContents | None,
        check_open: Callable[[], None],
    ) -> None:
        """``check_open`` raises once the store is closed."""
        self._base = base
        self._limits = limits
        self._files = files
        self._packed = packed
        self._index = index
        self._tier = tier
        self._loader = loader
        self._retirement = retirement
        self._changes = changes
        self._cards = cards
        self._writing = writing
        self._refresh = refresh
        self._shared = shared
        self._local = local
        self._check_open = check_open

    def put_directory(self, name: str, path: Path, options: PutOptions) -> AdapterCard:
        """Raises what ``put_files`` raises, or SourceError."""
        files = read_directory(path, self._limits)
        return self._put_local(name, files, options, {"source": "directory", "path": str(path)})

    def put_files(self, name: str, files: AdapterFiles, options: PutOptions) -> AdapterCard:
        """Raises AdapterRefused, RevisionConflict or QuotaExceeded; then nothing changed."""
        return self._put(name, files, options, {"source": "upload"})

    def put_tensors(
        self,
        name: str,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        options: PutOptions,
    ) -> AdapterCard:
        weights = safetensors.torch.save({key: t.contiguous() for key, t in tensors.items()})
        files = AdapterFiles(json.dumps(config).encode(), [weights], None)
        return self._put(name, files, options, {"source": "generated"})

    def put_source(
        self,
        name: str,
        uri: str,
        allowed_roots: Sequence[Path],
        options: PutOptions,
        progress: Progress,
        with_card: WithCard | None,
    ) -> AdapterCard:
        check_name(name)
        with self.folder() as staged:
            progress("fetch", 0.0)
            fetched = fetch(uri, staged, allowed_roots, self._limits)
            progress("check", 0.5)
            card_file = None if with_card is None else read_card(fetched.files, self._limits)
            if with_card is not None and card_file is not None:
                options = with_card(card_file, options)
            card = self._put_local(name, fetched.files, options, fetched.provenance)
            progress("done", 1.0)
            return card

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """See ``AdapterStore.upload_folder``."""
        folder = self._files.stage()
        try:
            yield folder
        finally:
            self._files.discard(folder)

    def _put_local(
        self, name: str, files: LocalFiles, options: PutOptions, source: Mapping[str, JsonValue]
    ) -> AdapterCard:
        with files.open_weights() as weights:
            adapter = AdapterFiles(
                files.config, chunks_of(weights), files.chat_template, files.companions
            )
            return self._put(name, adapter, options, source)

    def _put(
        self, name: str, files: AdapterFiles, options: PutOptions, source: Mapping[str, JsonValue]
    ) -> AdapterCard:
        """``source``: where the content comes from, unless the options say so."""
        check_name(name)
        self._check_open()
        if not options.provenance:
            options = replace(options, provenance=dict(source))
        tenant = tenant_of(name)
        with ingest(files, self._files, self._base, self._limits, tenant=tenant) as ingested:
            prepared = self._loader.prepare(ingested.reading.plan)
            content = self._offer(name, ingested, options)
            self._retirement.hold(content.digest)  # a delete from here on waits for the rest
            try:
                put = self._commit(name, content, ingested, options)
                self._cards.set_servable(content.digest)
                self._packed.keep(prepared, ingested.plan_sha256)
                if self._tier.has_room(content.host_bytes):  # a new content is likely to be used
                    self._tier.keep(prepared, content.host_bytes, tenant=tenant)
                if self._local is not None:
                    self._local.touch(content.digest)
                    self._local.make_room()
            finally:
                self._retirement.let_go(content.digest)
        return self._cards.of_put(put, content, ingested.reading.report)

    def _offer(self, name: str, ingested: Ingested, options: PutOptions) -> Content:
        """What the name will point at; with a catalogue its files are there, for all servers."""
        plan, report = ingested.reading
        content = Content(
            digest=plan.digest,
            family=_family(plan, options.provenance or {}),
            ranks=tuple(sorted({m.rank for m in plan.modules.values() if m.rank})),
            disk_bytes=ingested.n_bytes,
            host_bytes=plan.n_bytes,
            base_fingerprint=self._base.fingerprint,
            plan_sha256=ingested.plan_sha256,
            task=None if plan.head is None else plan.head.task,
        )
        if self._shared is None:
            return content
        self._refresh.refresh_before_put(name, options)
        self._changes.check_put(name, content, options)  # spares the upload
        return self._shared.offer(content, report, ingested.staged, tenant_of(name))

    def _commit(self, name: str, content: Content, ingested: Ingested, options: PutOptions) -> Put:
        """Publishes the files, then moves the name."""
        try:
            with self._changes.changing_with_quota(name, options):
                self._changes.check_put(name, content, options)  # before any file moves
                return self._publish(name, content, ingested, options)
        finally:
            if self._shared is not None:
                self._shared.withdraw(content)

    def _publish(self, name: str, content: Content, ingested: Ingested, options: PutOptions) -> Put:
        with self._writing:
            was_there = self._index.content(content.digest) is not None
            self._files.publish(ingested.staged, content.digest)
        try:
            return self._changes.point(name, content, ingested.reading.report, options)
        except (StoreError, sqlite3.Error) as error:
            # After an input/output error the change may yet be found in SQLite's log by the
            # next start; if it is not, that start sweeps the files.
            is_undone = not getattr(error, "sqlite_errorname", "").startswith("SQLITE_IOERR")
            if is_undone and not was_there:
                with self._writing:
                    self._files.remove(content.digest)
            raise


def _family(plan: AdapterPlan, provenance: Mapping[str, JsonValue]) -> Family:
    return Family.GENERATED if provenance.get("source") == "generated" else plan.family
