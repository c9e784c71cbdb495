"""The state of the server at one scrape, under vLLM's names and our own.

A custom collector: every scrape builds current samples, so nothing stale is left behind and the
number of series is bounded whatever the number of adapters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.engine.client import EngineClient, EngineStats
from loraplex_server.engine.config import EngineConfig
from loraplex_server.faults import Faults

from .engine_families import EngineFamilies
from .histograms import LABELS
from .server_metrics import ServerMetrics
from .single_samples import SingleSamples

__all__ = ["LoraplexCollector", "fault_family"]

_LISTING_AGE_S = 2.0  # how long a listing of the store is reused
_REVIEW_S = 10.0
_TIERS = ("device", "host", "disk")


class LoraplexCollector(Collector):
    """Reads the engine, the store and the front's counters. ``collect`` runs on the event loop.

    Call ``refresh_listing`` on another thread before it.
    """

    def __init__(
        self,
        engine: EngineClient,
        store: AdapterStore,
        metrics: ServerMetrics,
        faults: Faults,
        config: EngineConfig,
        model_name: str,
        *,
        with_engine: bool = True,
    ) -> None:
        """``with_engine``: whether ``collect`` tells of the engine, too."""
        self._with_engine = with_engine
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._faults = faults
        self._engine_families = EngineFamilies(config, model_name)
        self._one = SingleSamples(model_name)
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
        yield fault_family(self._faults.counts)

    def engine_families(self, stats: EngineStats, *, alive: bool) -> Iterator[Metric]:
        """Of one engine, by what it said last; names are those of the last listing."""
        return self._engine_families.of(stats, self._listing, alive=alive)

    def refresh_listing(self) -> None:
        """Lists the store if the last listing is old: milliseconds, so not for the event loop."""
        now = time.monotonic()
        if now - self._listed_at > _LISTING_AGE_S:
            self._listing, self._listed_at = self._store.seen(), now

    @property
    def listing(self) -> tuple[AdapterCard, ...]:
        """As of the last ``refresh_listing``."""
        return self._listing

    def _token_families(self) -> Iterator[Metric]:
        counter, metrics = self._one.counter, self._metrics
        yield counter(
            "vllm:prompt_tokens", "Prompt tokens of all admitted calls.", metrics.n_prompt_tokens
        )
        yield counter(
            "vllm:generation_tokens", "Tokens generated for all choices.", metrics.n_output_tokens
        )
        finished = CounterMetricFamily(
            "vllm:request_success",
            "Choices by how they ended.",
            labels=(*LABELS, "finished_reason"),
        )
        for reason, count in metrics.finished.items():
            finished.add_metric((*self._one.values, reason), count)
        yield finished

    def _store_families(self, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
        gauge, counter = self._one.gauge, self._one.counter
        yield gauge("loraplex_adapters_registered", "Registered adapter names.", len(cards))
        held = self._store.stats()
        host = GaugeMetricFamily(
            "loraplex_host_tier_bytes",
            "Bytes of adapters in host memory: used, and the budget.",
            labels=("state",),
        )
        host.add_metric(("used",), held.host_bytes_used)
        host.add_metric(("total",), held.host_bytes_total)
        yield host
        yield gauge("loraplex_disk_tier_bytes", "Bytes of adapter files on disk.", held.disk_bytes)
        yield gauge(
            "loraplex_adapter_leases",
            "Leases that running requests hold on adapters.",
            held.n_leases,
        )
        yield counter(
            "loraplex_host_tier_hits",
            "Leases of adapters that were in host memory.",
            held.n_host_hits,
        )
        yield counter("loraplex_host_tier_loads", "Loads from disk.", held.n_host_loads)
        yield counter(
            "loraplex_host_tier_evictions",
            "Adapters that left host memory for others.",
            held.n_host_evictions,
        )
        load_s = SummaryMetricFamily("vllm:lora_adapter_load_seconds", "Loads from disk.")
        load_s.add_metric((), count_value=held.n_host_loads, sum_value=held.load_seconds)
        yield load_s

    def _adapter_families(self) -> Iterator[Metric]:
        usage = self._metrics.usage
        now = time.monotonic()
        if now - self._reviewed_at > _REVIEW_S:
            usage.review()
            self._reviewed_at = now
        labels = ("adapter",)
        requests = CounterMetricFamily("loraplex_adapter_requests", "Calls.", labels=labels)
        prompt = CounterMetricFamily("loraplex_adapter_prompt_tokens", "Prompt.", labels=labels)
        output = CounterMetricFamily("loraplex_adapter_tokens", "Generated.", labels=labels)
        found = CounterMetricFamily(
            "loraplex_adapter_prefix_hit_tokens",
            "Prompt tokens found in the prefix cache, by adapter.",
            labels=labels,
        )
        wait = CounterMetricFamily(
            "loraplex_adapter_lease_seconds",
            "Seconds that calls waited for their adapter.",
            labels=labels,
        )
        queue = SummaryMetricFamily("loraplex_adapter_queue_seconds", "Queued.", labels=labels)
        ttft = SummaryMetricFamily(
            "loraplex_adapter_time_to_first_token_seconds",
            "Seconds to the first token, by adapter.",
            labels=labels,
        )
        for row in usage.all():
            label = (row.name,)
            requests.add_metric(label, row.n_requests)
            prompt.add_metric(label, row.n_prompt_tokens)
            output.add_metric(label, row.n_output_tokens)
            found.add_metric(label, row.n_prefix_hits)
            wait.add_metric(label, row.load_s)
            queue.add_metric(label, count_value=row.n_queued, sum_value=row.queue_s)
            ttft.add_metric(label, count_value=row.n_first_tokens, sum_value=row.ttft_s)
        yield from (requests, prompt, output, found, wait, queue, ttft)

    def _tier_families(self, stats: EngineStats, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
        """How many adapters each tier holds, and the tier of each busy one."""
        resident = set(stats.resident_adapters)
        shown = {row.name for row in self._metrics.usage.all()}
        counts = dict.fromkeys(_TIERS, 0)
        of_shown = GaugeMetricFamily(
            "loraplex_adapter_tier",
            "1 for the highest tier that an adapter lies in: device, host or disk.",
            labels=("adapter", "tier"),
        )
        n_bytes = GaugeMetricFamily(
            "loraplex_adapter_bytes",
            "Bytes that an adapter takes on disk, and in host and device memory while it is there.",
            labels=("adapter", "tier"),
        )
        for card in cards:
            on_host = "host" if card.n_bytes.host else "disk"
            tier = "device" if card.digest in resident else on_host
            counts[tier] += 1
            if card.name in shown:
                of_shown.add_metric((card.name, tier), 1.0)
                n_bytes.add_metric((card.name, "disk"), card.n_bytes.disk)
                n_bytes.add_metric((card.name, "host"), card.n_bytes.host)
                on_device = stats.resident_bytes.get(card.digest, 0)
                n_bytes.add_metric((card.name, "device"), on_device)
        by_tier = GaugeMetricFamily(
            "loraplex_adapters_by_tier",
            "Registered names by the highest tier they lie in.",
            labels=("tier",),
        )
        for tier, count in counts.items():
            by_tier.add_metric((tier,), count)
        yield from (by_tier, of_shown, n_bytes)

    def _http_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "http_requests",
            "HTTP answers by route, method and status.",
            labels=("handler", "method", "status"),
        )
        for (handler, method, status), count in self._metrics.http.items():
            requests.add_metric((handler, method, str(status)), count)
        yield requests
        seconds = SummaryMetricFamily(
            "http_request_duration_seconds",
            "Seconds from a request to the last byte of its answer.",
            labels=("handler",),
        )
        for handler, (count, total) in self._metrics.http_seconds.items():
            seconds.add_metric((handler,), count_value=count, sum_value=total)
        yield seconds


def fault_family(counts: Mapping[str, int]) -> Metric:
    """``counts``: failures by part."""
    family = CounterMetricFamily(
        "loraplex_faults", "Failures of the server's own parts.", labels=("part",)
    )
    for part, count in counts.items():
        family.add_metric((part,), count)
    return family
