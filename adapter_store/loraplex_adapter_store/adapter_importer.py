"""Adds an adapter: reads and checks its files, publishes them, and points a name at them."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from loraplex_adapter_store.catalogue.shared_contents import LocalContents
from loraplex_adapter_store.contents.content_files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    PLAN_FILE,
    WEIGHTS_FILE,
    ContentFiles,
)
from loraplex_adapter_store.contents.plan_file import pack_plan
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile
from loraplex_adapter_store.fold.reader import Reading, read_adapter
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.names.name_state import Change
from loraplex_adapter_store.names.name_syntax import check_name, tenant_of
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.sources.local import LocalFiles, read_card
from loraplex_adapter_store.sources.uri import fetch

from .base_spec import BaseSpec
from .cards import Cards
from .content_loader import ContentLoader
from .errors import LimitExceeded, StoreError
from .garbage_collector import GarbageCollector
from .limits import StoreLimits
from .name_changes import NameChanges
from .plan import AdapterPlan, Family
from .report import JsonValue
from .store_state import StoreState

_CHUNK = 1 << 20


class AdapterFiles(NamedTuple):
    """The files of an adapter: config text, safetensors bytes, and files beside them."""

    config: bytes
    weights: Iterable[bytes] | Path  # a path of the store's own: the file does not change
    chat_template: str | None
    companions: Mapping[str, bytes] = MappingProxyType({})  # see ``companion_files``


class Ingested(NamedTuple):
    staged: Path
    reading: Reading
    plan_sha256: str
    n_bytes: int  # of the staged files


def chunks_of(weights: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: weights.read(_CHUNK), b"")


@contextmanager
def ingest(
    adapter: AdapterFiles,
    files: ContentFiles,
    base: BaseSpec,
    limits: StoreLimits,
    *,
    tenant: str = "",
) -> Iterator[Ingested]:
    """Copy or link, check and fold an adapter. On leaving, unpublished files are deleted.

    Bytes from outside the store are copied before they are checked, so that nobody can change them
    meanwhile. Raises AdapterRefused.
    """
    config = AdapterConfig.parse(adapter.config, limits)
    with files.staging_folder() as staged:
        files.write(staged / CONFIG_FILE, [adapter.config])
        if isinstance(adapter.weights, Path):
            files.link(adapter.weights, staged / WEIGHTS_FILE)
        else:
            files.write(staged / WEIGHTS_FILE, _bounded(adapter.weights, limits.max_file_bytes))
        if adapter.chat_template is not None:
            files.write(staged / CHAT_TEMPLATE_FILE, [adapter.chat_template.encode()])
        with SafetensorsFile(staged / WEIGHTS_FILE, limits) as tensors:
            reading = read_adapter(
                config,
                tensors,
                base,
                limits,
                chat_template=adapter.chat_template,
                companions=adapter.companions,
                tenant=tenant,
            )
        packed = pack_plan(reading.plan)
        files.write(staged / PLAN_FILE, packed.chunks)
        yield Ingested(staged, reading, packed.sha256, files.n_bytes(staged))


def _bounded(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    n_bytes = 0
    for chunk in chunks:
        n_bytes += len(chunk)
        if n_bytes > limit:
            raise LimitExceeded(f"the weights exceed {limit} bytes")
        yield chunk


Progress = Callable[[str, float], None]  # stage, share done in [0, 1]
WithCard = Callable[[bytes, PutOptions], PutOptions]  # what a source's card.json adds


@dataclass(eq=False)
class AdapterImporter:
    """Adds adapters to the store, on the calling thread. Thread-safe."""

    _state: StoreState
    _loader: ContentLoader
    _garbage: GarbageCollector
    _changes: NameChanges
    _cards: Cards
    _local: LocalContents | None  # the catalogue's contents on this disk

    def put_source(
        self,
        name: str,
        uri: str,
        allowed_roots: Sequence[Path],
        options: PutOptions,
        progress: Progress,
        with_card: WithCard | None,
    ) -> AdapterCard:
        """See ``AdapterStore.put_source``."""
        check_name(name)
        limits, quota = self._state.limits, options.quota
        with self._state.files.staging_folder() as staged:
            progress("fetch", 0.0)
            n_beside = self._changes.n_bytes_beside(tenant_of(name), name)
            n_most = limits.max_file_bytes
            if quota.max_bytes is not None:
                n_most = min(n_most, max(0, quota.max_bytes - n_beside))
            try:
                fetched = fetch(uri, staged, allowed_roots, replace(limits, max_file_bytes=n_most))
            except LimitExceeded as error:
                if n_most < limits.max_file_bytes and str(error).startswith(WEIGHTS_FILE):
                    quota.check_bytes(n_beside + n_most + 1)
                raise
            progress("check", 0.5)
            if with_card is not None:
                card_file = read_card(fetched.files, limits)
                options = options if card_file is None else with_card(card_file, options)
            card = self.put_local(name, fetched.files, options, fetched.provenance)
            progress("done", 1.0)
            return card

    def put_local(
        self, name: str, files: LocalFiles, options: PutOptions, source: Mapping[str, JsonValue]
    ) -> AdapterCard:
        with files.open_weights() as weights:
            adapter = AdapterFiles(
                files.config, chunks_of(weights), files.chat_template, files.companions
            )
            return self.put(name, adapter, options, source)

    def put_stored(self, name: str, digest: str, options: PutOptions) -> AdapterCard | None:
        """See ``AdapterStore.put_stored``."""
        check_name(name)
        self._state.check_open()
        if self._local is not None:
            return None
        self._garbage.hold(digest)
        try:
            content = self._state.index.content(digest)
            if content is None or content.base_fingerprint != self._state.base.fingerprint:
                return None
            report = self._state.registry.report(content)
            with self._changes.changing_with_quota(name, options):
                self._changes.check_put(name, content, options)
                change = self._changes.point(name, content, report, options)
        finally:
            self._garbage.let_go(digest)
        return self._cards.of_change(change, report)

    def put(
        self, name: str, files: AdapterFiles, options: PutOptions, source: Mapping[str, JsonValue]
    ) -> AdapterCard:
        """Check, store and name an adapter. Raises AdapterRefused, RevisionConflict, QuotaExceeded.

        ``source`` is the provenance unless ``options`` has one. An error leaves nothing changed.
        """
        check_name(name)
        self._state.check_open()
        state = self._state
        if not options.provenance:
            options = replace(options, provenance=dict(source))
        tenant = tenant_of(name)
        with ingest(files, state.files, state.base, state.limits, tenant=tenant) as ingested:
            prepared = self._loader.prepare(ingested.reading.plan)
            content = self._offer(name, ingested, options)
            self._garbage.hold(content.digest)  # a delete waits from here on
            try:
                change = self._commit(name, content, ingested, options)
                self._cards.set_servable(content.digest)
                self._loader.keep_prepared(prepared, ingested.plan_sha256)
                if state.tier.has_room(content.host_bytes):  # a new adapter is likely to be used
                    state.tier.keep(prepared, content.host_bytes, tenant=tenant)
                if self._local is not None:
                    self._local.touch(content.digest)
                    self._local.make_room()
            finally:
                self._garbage.let_go(content.digest)
        return self._cards.of_change(change, ingested.reading.report)

    def _offer(self, name: str, ingested: Ingested, options: PutOptions) -> Content:
        """Return the content that the name will point at; upload its files to the catalogue."""
        plan, report = ingested.reading
        content = Content(
            digest=plan.digest,
            family=_family(plan, options.provenance or {}),
            ranks=tuple(sorted({m.rank for m in plan.modules.values() if m.rank})),
            disk_bytes=ingested.n_bytes,
            host_bytes=plan.n_bytes,
            base_fingerprint=self._state.base.fingerprint,
            plan_sha256=ingested.plan_sha256,
            task=None if plan.head is None else plan.head.task,
        )
        if self._local is None:
            return content
        self._changes.refresh_before_put(name, options)
        self._changes.check_put(name, content, options)  # before the upload
        return self._local.shared.offer(content, report, ingested.staged, tenant_of(name))

    def _commit(
        self, name: str, content: Content, ingested: Ingested, options: PutOptions
    ) -> Change:
        """Publish the files, then point the name at them."""
        try:
            with self._changes.changing_with_quota(name, options):
                self._changes.check_put(name, content, options)  # before any file moves
                return self._publish(name, content, ingested, options)
        finally:
            if self._local is not None:
                self._local.shared.withdraw(content)

    def _publish(
        self, name: str, content: Content, ingested: Ingested, options: PutOptions
    ) -> Change:
        state = self._state
        with state.writing:
            was_there = state.index.content(content.digest) is not None
            n_bytes = state.files.publish(ingested.staged, content.digest)
        if self._local is None:  # the files of an equal content may have another size
            content = replace(content, disk_bytes=n_bytes)
        try:
            return self._changes.point(name, content, ingested.reading.report, options)
        except (StoreError, sqlite3.Error) as error:
            # SQLite's log may hold the change even after an I/O error, and the next start would
            # find it there. So the files stay; a start that does not find the change deletes them.
            is_undone = not getattr(error, "sqlite_errorname", "").startswith("SQLITE_IOERR")
            if is_undone and not was_there:
                with state.writing:
                    state.files.remove(content.digest)
            raise


def _family(plan: AdapterPlan, provenance: Mapping[str, JsonValue]) -> Family:
    return Family.GENERATED if provenance.get("source") == "generated" else plan.family
