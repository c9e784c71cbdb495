"""The cards of adapters, put together from names, contents and memory."""

import logging
from dataclasses import asdict, fields

from .content_loader import ContentLoader
from .errors import UnknownAdapter
from .names.card import AdapterCard, PlanSize, StoreStats, TierBytes
from .names.name_record import Content, NameRecord
from .names.name_state import Change
from .report import LoadReport
from .store_state import StoreState

_log = logging.getLogger(__name__)


class Cards:
    """Builds cards. Thread-safe. Owns the reasons why stored contents cannot be served here."""

    def __init__(self, state: StoreState) -> None:
        self._index, self._tier, self._registry = state.index, state.tier, state.registry
        self._unservable: dict[str, str] = {}  # digest → reason

    def get(self, name: str) -> AdapterCard:
        """Return the card with its load report. Raises UnknownAdapter."""
        while True:
            record, content = self._index.current(name)
            try:
                report = self._registry.report(content)
            except UnknownAdapter:
                if self._index.content(record.digest) is not None:
                    raise
                continue  # the name moved meanwhile, and its old content was deleted
            return self._card(record, content, report)

    def all(self) -> tuple[AdapterCard, ...]:
        """Return all cards, sorted by name, without load reports."""
        cards = [self._card(record, content) for record, content in self._index.all_current()]
        return tuple(sorted(cards, key=lambda card: card.name))

    def revisions(self, name: str) -> tuple[AdapterCard, ...]:
        """Return the current revision, then the kept ones, without load reports."""
        pairs = self._index.revisions(name)
        return tuple(self._card(record, content) for record, content in pairs)

    def of_change(self, change: Change, report: LoadReport) -> AdapterCard:
        """Return the card of a name that was pointed at another content."""
        assert change.after.current is not None
        replaced = None if change.before.record is None else change.before.record.digest
        return self._card(*change.after.current, report, replaced)

    def stats(self) -> StoreStats:
        contents = self._index.contents()
        return StoreStats(
            **asdict(self._tier.stats()),
            n_adapters=len(self._index.all_current()),
            n_digests=len(contents),
            disk_bytes=sum(content.disk_bytes for content in contents),
        )

    def plans_in_memory(self) -> dict[str, PlanSize]:
        sizes = {}
        for digest, n_bytes in self._tier.sizes().items():
            content = self._index.content(digest)
            ranks = () if content is None else content.ranks
            sizes[digest] = PlanSize(n_bytes, max(ranks, default=0))
        return sizes

    def check_stored(self, loader: ContentLoader) -> None:
        """Mark the stored contents that this server cannot serve. Called at start."""
        for content in self._index.contents():
            refusal = loader.refusal(content)
            if refusal is not None:
                _log.warning("adapter %s is not served: %s", content.digest[:12], refusal)
                self.set_unservable(content.digest, refusal)

    def set_unservable(self, digest: str, reason: str) -> None:
        """Keep the content, and let its cards say why it is not served."""
        self._unservable[digest] = reason

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
            **{part.name: getattr(record, part.name) for part in fields(NameRecord)},
            family=content.family,
            ranks=content.ranks,
            n_bytes=TierBytes(content.disk_bytes, self._tier.bytes_of(record.digest)),
            base_fingerprint=content.base_fingerprint,
            n_leases=self._tier.n_leases(record.digest),
            report=report,
            replaced=replaced,
            last_load_s=self._tier.last_load_s(record.digest),
            unservable=self._unservable.get(record.digest),
            task=content.task,
        )
