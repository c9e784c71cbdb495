"""Renders /metrics, under vLLM's names and our own.

Every scrape builds its samples from the current state, so no stale series remain and the number of
series is bounded.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapter_store.names.card import AdapterCard, StoreStats
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.requests.client import EngineClient, EngineStats
from loraplex_server.health_tracker import HealthTracker

from .adapter_usage import AdapterCounters
from .engine_families import engine_families
from .families import LABELS, counter, gauge, states, summary
from .server_metrics import ServerMetrics

_LISTING_AGE_S = 2.0  # how long a listing of the store is reused
_REVIEW_S = 10.0
_TIERS = ("device", "host", "disk")

# name → the value of the metric
_STORE_GAUGES: dict[str, Callable[[StoreStats], float]] = {
    "loraplex_disk_tier_bytes": lambda totals: totals.disk_bytes,
    "loraplex_adapter_leases": lambda totals: totals.n_leases,
}
_STORE_COUNTERS: dict[str, Callable[[StoreStats], float]] = {
    "loraplex_host_tier_hits": lambda totals: totals.n_host_hits,
    "loraplex_host_tier_loads": lambda totals: totals.n_host_loads,
    "loraplex_host_tier_evictions": lambda totals: totals.n_host_evictions,
}
_ADAPTER_COUNTERS: dict[str, Callable[[AdapterCounters], float]] = {
    "loraplex_adapter_requests": lambda row: row.n_requests,
    "loraplex_adapter_prompt_tokens": lambda row: row.n_prompt_tokens,
    "loraplex_adapter_tokens": lambda row: row.n_output_tokens,
    "loraplex_adapter_prefix_hit_tokens": lambda row: row.n_prefix_hits,
    "loraplex_adapter_lease_seconds": lambda row: row.load_s,
}


class LoraplexCollector(Collector):
    """Reads the engine, the store and the counters of requests. ``collect`` runs on the event loop.

    Call ``refresh_listing`` on another thread first.
    """

    def __init__(
        self,
        engine: EngineClient,
        store: AdapterStore,
        metrics: ServerMetrics,
        health_tracker: HealthTracker,
        config: EngineConfig,
        model_name: str,
        *,
        with_engine: bool = True,
    ) -> None:
        """``with_engine``: ``collect`` includes the engine."""
        self._with_engine = with_engine
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._health_tracker = health_tracker
        self._config = config
        self._server = (model_name, "0")  # values of ``LABELS``
        self._listing: tuple[AdapterCard, ...] = ()
        self._listed_at = self._reviewed_at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        cards = self._listing
        if self._with_engine:
            yield from self.engine_families(stats, alive=self._engine.alive)
        yield from self._token_families()
        yield from self._store_families(cards)
        yield from self._adapter_families()
        yield from self._tier_families(stats, cards)
        yield from self._http_families()
        yield fault_family(self._health_tracker.counts)

    def engine_families(self, stats: EngineStats, *, alive: bool) -> Iterator[Metric]:
        """Return the families of one engine. Names come from the last listing."""
        return engine_families(stats, self._listing, self._config, self._server, alive=alive)

    def refresh_listing(self) -> None:
        """List the store again if the listing is old. Takes milliseconds: not on the event loop."""
        now = time.monotonic()
        if now - self._listed_at > _LISTING_AGE_S:
            self._listing, self._listed_at = self._store.cards.all(), now

    @property
    def listing(self) -> tuple[AdapterCard, ...]:
        """The adapters at the last ``refresh_listing``."""
        return self._listing

    def _token_families(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield counter("vllm:prompt_tokens", LABELS, [(self._server, metrics.n_prompt_tokens)])
        yield counter("vllm:generation_tokens", LABELS, [(self._server, metrics.n_output_tokens)])
        ends = [((*self._server, reason), count) for reason, count in metrics.finished.items()]
        yield counter("vllm:request_success", (*LABELS, "finished_reason"), ends)

    def _store_families(self, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
        totals = self._store.stats()
        yield gauge("loraplex_adapters_registered", LABELS, [(self._server, len(cards))])
        for name, value in _STORE_GAUGES.items():
            yield gauge(name, LABELS, [(self._server, value(totals))])
        for name, value in _STORE_COUNTERS.items():
            yield counter(name, LABELS, [(self._server, value(totals))])
        used, total = totals.host_bytes_used, totals.host_bytes_total
        yield states("loraplex_host_tier_bytes", used=used, total=total)
        loads = ((), totals.n_host_loads, totals.load_seconds)
        yield summary("vllm:lora_adapter_load_seconds", (), [loads])

    def _adapter_families(self) -> Iterator[Metric]:
        now = time.monotonic()
        if now - self._reviewed_at > _REVIEW_S:
            self._metrics.usage.review()
            self._reviewed_at = now
        rows, labels = list(self._metrics.usage.all()), ("adapter",)
        for name, value in _ADAPTER_COUNTERS.items():
            yield counter(name, labels, [((row.name,), value(row)) for row in rows])
        queue = [((row.name,), row.n_queued, row.queue_s) for row in rows]
        yield summary("loraplex_adapter_queue_seconds", labels, queue)
        ttft = [((row.name,), row.n_first_tokens, row.ttft_s) for row in rows]
        yield summary("loraplex_adapter_time_to_first_token_seconds", labels, ttft)

    def _tier_families(self, stats: EngineStats, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
        """Return the number of adapters of each tier, and the tier of each busy adapter."""
        resident = set(stats.resident_adapters)
        shown = {row.name for row in self._metrics.usage.all()}
        counts = dict.fromkeys(_TIERS, 0)
        tiers: list[tuple[tuple[str, str], float]] = []
        n_bytes: list[tuple[tuple[str, str], float]] = []
        for card in cards:
            on_host = "host" if card.n_bytes.host else "disk"
            tier = "device" if card.digest in resident else on_host
            counts[tier] += 1
            if card.name in shown:
                tiers.append(((card.name, tier), 1.0))
                n_bytes.append(((card.name, "disk"), card.n_bytes.disk))
                n_bytes.append(((card.name, "host"), card.n_bytes.host))
                on_device = stats.resident_bytes.get(card.digest, 0)
                n_bytes.append(((card.name, "device"), on_device))
        by_tier = [((tier,), count) for tier, count in counts.items()]
        yield gauge("loraplex_adapters_by_tier", ("tier",), by_tier)
        yield gauge("loraplex_adapter_tier", ("adapter", "tier"), tiers)
        yield gauge("loraplex_adapter_bytes", ("adapter", "tier"), n_bytes)

    def _http_families(self) -> Iterator[Metric]:
        answers = [((*key[:2], str(key[2])), n) for key, n in self._metrics.http.items()]
        yield counter("http_requests", ("handler", "method", "status"), answers)
        seconds = [((handler,), *total) for handler, total in self._metrics.http_seconds.items()]
        yield summary("http_request_duration_seconds", ("handler",), seconds)


def fault_family(counts: Mapping[str, int]) -> Metric:
    """Return the metric family of the failures of each part."""
    return counter("loraplex_faults", ("part",), [((part,), n) for part, n in counts.items()])
