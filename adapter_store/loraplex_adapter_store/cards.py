"""Cards: what the store tells about each adapter, put together from names, contents and memory."""

from __future__ import annotations

import logging

from .card import AdapterCard, PlanSize, StoreStats, TierBytes
from .content_loader import ContentLoader
from .errors import UnknownAdapter
from .host_tier import HostTier
from .name_index import NameIndex
from .name_record import Content, NameRecord, Put
from .name_registry import NameRegistry
from .report import LoadReport

__all__ = ["Cards"]

_log = logging.getLogger(__name__)


class Cards:
    """Thread-safe. Owner of why contents of earlier servers cannot be served by this one."""

    def __init__(self, index: NameIndex, tier: HostTier, registry: NameRegistry) -> None:
        self._index = index
        self._tier = tier
        self._registry = registry
        self._unservable: dict[str, str] = {}  # digest → why

    def get(self, name: str) -> AdapterCard:
        """With its load report. Raises UnknownAdapter."""
        while True:
            record, content = self._index.current(name)
            try:
                report = self._registry.report(content)
            except UnknownAdapter:
                if self._index.content(record.digest) is not None:
                    raise
                continue  # the name moved, and its old content went, between the two
            return self._card(record, content, report)

    def all(self) -> tuple[AdapterCard, ...]:
        """By name, without their load reports."""
        cards = [self._card(record, content) for record, content in self._index.pairs()]
        return tuple(sorted(cards, key=lambda card: card.name))

    def revisions(self, name: str) -> tuple[AdapterCard, ...]:
        """The current one, then the kept ones, without their load reports."""
        pairs = self._index.revisions(name)
        return tuple(self._card(record, content) for record, content in pairs)

    def of_put(self, put: Put, content: Content, report: LoadReport) -> AdapterCard:
        replaced = None if put.previous is None else put.previous.digest
        return self._card(put.record, content, report, replaced)

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
        found = {}
        for digest, n_bytes in self._tier.sizes().items():
            content = self._index.content(digest)
            ranks = () if content is None else content.ranks
            found[digest] = PlanSize(n_bytes, max(ranks, default=0))
        return found

    def check_stored(self, loader: ContentLoader) -> None:
        """At start: contents that this server cannot serve stay, and their cards say why."""
        for content in self._index.contents():
            refusal = loader.refusal(content)
            if refusal is not None:
                _log.warning("adapter %s is not served: %s", content.digest[:12], refusal)
                self.set_unservable(content.digest, refusal)

    def set_unservable(self, digest: str, why: str) -> None:
        self._unservable[digest] = why

    def set_servable(self, digest: str) -> None:
        self._unservable.pop(digest, None)

    def _card(
        self,
        record: NameRecord,
        content: Content,
        report: LoadReport | None = None,
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
            last_load_s=self._tier.last_load_s(record.digest),
            unservable=self._unservable.get(record.digest),
            task=content.task,
        )
