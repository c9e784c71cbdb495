"""The state of the server at one scrape, under vLLM's names and our own.

A custom collector: every scrape builds current samples, so nothing stale is left behind and the
number of series is bounded whatever the number of adapters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.engine.client import STEP_TOKENS, EngineClient, EngineStats, TenantStats
from loraplex_server.engine.config import EngineConfig
from loraplex_server.faults import Faults

from .adapter_usage import OTHER
from .histograms import LABELS
from .server_metrics import ServerMetrics

__all__ = ["LoraplexCollector", "names_by_digest"]

_MAX_RESIDENCY_SERIES = 128
_LISTING_AGE_S = 2.0  # how long a listing of the store is reused
_REVIEW_S = 10.0
_MAX_TENANTS = 50
_TIERS = ("device", "host", "disk")
_LABELS = LABELS


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
        self._config = config
        self._values = (model_name, "0")
        self._listing: tuple[AdapterCard, ...] = ()
        self._listed_at = self._reviewed_at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        cards = self._listing
        if self._with_engine:
            yield from self.engine_families(stats)
        yield from self._token_families()
        yield from self._store_families(cards)
        yield from self._adapter_families()
        yield from self._tier_families(stats, cards)
        yield from self._http_families()
        yield self._fault_family()

    def engine_families(self, stats: EngineStats) -> Iterator[Metric]:
        """Of one engine, by what it said last; names are those of the last listing."""
        yield from self._engine_families(stats)
        yield from self._tenant_families(stats)
        yield from self._lora_families(stats, self._listing)
        yield from self._device_families(stats)

    def refresh_listing(self) -> None:
        """Lists the store if the last listing is old: milliseconds, so not for the event loop."""
        now = time.monotonic()
        if now - self._listed_at > _LISTING_AGE_S:
            self._listing, self._listed_at = self._store.seen(), now

    @property
    def listing(self) -> tuple[AdapterCard, ...]:
        """As of the last ``refresh_listing``."""
        return self._listing

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _engine_families(self, stats: EngineStats) -> Iterator[Metric]:
        total = stats.kv_pages_total
        used = stats.kv_pages_used / total if total else 0.0
        gauge, counter = self._gauge, self._counter
        yield gauge(
            "vllm:num_requests_running", "Requests that the engine computes now.", stats.n_running
        )
        yield gauge(
            "vllm:num_requests_waiting", "Requests that wait for the engine.", stats.n_waiting
        )
        yield gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", used)
        yield gauge("vllm:gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", used)
        pages = GaugeMetricFamily("loraplex_kv_pages", "Pages of the KV cache.", labels=("state",))
        pages.add_metric(("used",), stats.kv_pages_used)
        pages.add_metric(("total",), total)
        yield pages
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Geometry of the KV cache.",
            labels=("block_size", "num_gpu_blocks", "enable_prefix_caching", "engine"),
        )
        page, prefix = str(self._config.page_size), str(self._config.prefix_cache)
        info.add_metric((page, str(total), prefix, "0"), 1.0)
        yield info
        yield counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_queries,
        )
        yield counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits
        )
        yield counter(
            "vllm:num_preemptions",
            "Requests whose KV pages were taken for an older one.",
            stats.n_preemptions,
        )
        yield counter(
            "loraplex_forced_tokens",
            "Tokens of answers that their grammars left no choice about.",
            stats.n_forced_tokens,
        )
        step = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed in an engine step.", labels=_LABELS
        )
        step.add_metric(
            self._values, _cumulated(STEP_TOKENS, stats.steps_by_tokens), stats.n_step_tokens
        )
        yield step
        yield counter("loraplex_engine_steps", "Forward passes of the engine.", stats.n_steps)
        yield gauge("loraplex_engine_up", "1 while the engine lives.", float(self._engine.alive))
        age = stats.step_age_s
        yield gauge("loraplex_engine_step_age_seconds", "Since the engine last moved.", age)

    def _token_families(self) -> Iterator[Metric]:
        counter, metrics = self._counter, self._metrics
        yield counter(
            "vllm:prompt_tokens", "Prompt tokens of all admitted calls.", metrics.n_prompt_tokens
        )
        yield counter(
            "vllm:generation_tokens", "Tokens generated for all choices.", metrics.n_output_tokens
        )
        finished = CounterMetricFamily(
            "vllm:request_success",
            "Choices by how they ended.",
            labels=(*_LABELS, "finished_reason"),
        )
        for reason, count in metrics.finished.items():
            finished.add_metric((*self._values, reason), count)
        yield finished

    def _tenant_families(self, stats: EngineStats) -> Iterator[Metric]:
        """The first tenants that came have their own series, all others share one."""
        yield self._counter(
            "loraplex_rows_taken_back",
            "Running requests that were preempted for another tenant.",
            stats.n_rows_taken_back,
        )
        shown, others = stats.tenants[:_MAX_TENANTS], stats.tenants[_MAX_TENANTS:]
        if others:
            shown += (
                TenantStats(OTHER, *map(sum, zip(*(one[1:] for one in others), strict=True))),
            )
        requests = GaugeMetricFamily(
            "loraplex_tenant_requests",
            "Requests in the engine by tenant of their API key.",
            labels=("tenant", "state"),
        )
        steps = SummaryMetricFamily(
            "loraplex_tenant_queue_steps",
            "Steps of the engine that requests waited for their first row.",
            labels=("tenant",),
        )
        for one in shown:
            requests.add_metric((one.tenant, "running"), one.n_running)
            requests.add_metric((one.tenant, "waiting"), one.n_waiting)
            steps.add_metric((one.tenant,), one.n_admitted, one.n_steps_queued)
        yield from (requests, steps)

    def _lora_families(self, stats: EngineStats, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
        names = names_by_digest(cards)
        resident = set(stats.resident_adapters)
        waiting = [digest for digest in stats.waiting_adapters if digest not in resident]
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "One sample, its value the time: adapters on the device, adapters waited for.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running_label = _joined(names, sorted(resident | set(stats.running_adapters)))
        info.add_metric(
            (str(stats.pool_slots_total), running_label, _joined(names, waiting)), time.time()
        )
        yield info
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            f"Where adapters are, at most {_MAX_RESIDENCY_SERIES} of them, device first.",
            labels=("adapter_name", "level", "pinned", "rank"),
        )
        on_device = [card for card in cards if card.digest in resident]
        on_host = [card for card in cards if card.n_bytes.host and card.digest not in resident]
        for level, group in (("gpu", on_device), ("cpu", on_host)):
            room = _MAX_RESIDENCY_SERIES - len(loaded.samples)
            for card in group[:room]:
                rank = str(max(card.ranks, default=0))
                loaded.add_metric((card.name, level, str(card.pinned).lower(), rank), 1.0)
        yield loaded
        n_host = sum(1 for card in cards if card.n_bytes.host)
        yield self._gauge(
            "vllm:num_gpu_loaded_lora_adapters", "Adapters in device memory.", len(resident)
        )
        yield self._gauge(
            "vllm:num_cpu_loaded_lora_adapters",
            "Adapters in host memory, not on the device.",
            n_host,
        )
        yield self._gauge(
            "vllm:max_gpu_lora_adapters",
            "Distinct adapters that one step may use.",
            stats.pool_slots_total,
        )

    def _device_families(self, stats: EngineStats) -> Iterator[Metric]:
        counter = self._counter
        pool = GaugeMetricFamily(
            "loraplex_adapter_pool_bytes", "Device pool of adapter pages.", labels=("state",)
        )
        pool.add_metric(("used",), stats.pool_bytes_used)
        pool.add_metric(("total",), stats.pool_bytes_total)
        yield pool
        yield counter(
            "loraplex_adapter_loads", "Adapters copied to the device.", stats.n_adapter_loads
        )
        device_s = SummaryMetricFamily(
            "loraplex_adapter_device_load_seconds", "Reserve to resident, for each load."
        )
        device_s.add_metric((), stats.n_adapter_loads, stats.adapter_load_seconds)
        yield device_s
        evictions = stats.n_adapter_evictions
        yield counter(
            "loraplex_adapter_evictions", "Adapters taken off the device for others.", evictions
        )

    def _store_families(self, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
        gauge, counter = self._gauge, self._counter
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
            "Bytes that an adapter takes on disk, and in host memory while it is there.",
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

    def _fault_family(self) -> Metric:
        family = CounterMetricFamily(
            "loraplex_faults", "Failures of the server's own parts.", labels=("part",)
        )
        for part, count in self._faults.counts.items():
            family.add_metric((part,), count)
        return family


def names_by_digest(cards: Sequence[AdapterCard]) -> Mapping[str, str]:
    return {card.digest: card.name for card in cards}


def _joined(names: Mapping[str, str], digests: Sequence[str]) -> str:
    """Routers split this label on commas; mixtures and retired revisions have no name."""
    return ",".join(names[digest] for digest in digests if digest in names)


def _cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: (upper bound, observations up to it), the last +Inf."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))
