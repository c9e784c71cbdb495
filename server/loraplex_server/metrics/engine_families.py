"""What one engine tells: rows, KV cache, steps, tenants, adapters on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import (
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric

from loraplex_adapter_store.card import AdapterCard
from loraplex_server.engine.client import STEP_TOKENS, EngineStats, TenantStats
from loraplex_server.engine.config import EngineConfig

from .adapter_usage import OTHER
from .histograms import LABELS
from .single_samples import SingleSamples

__all__ = ["EngineFamilies", "names_by_digest"]

_MAX_RESIDENCY_SERIES = 128
_MAX_TENANTS = 50


class EngineFamilies:
    """Stateless: each call builds current samples."""

    def __init__(self, config: EngineConfig, model_name: str) -> None:
        self._config = config
        self._one = SingleSamples(model_name)

    def of(
        self, stats: EngineStats, cards: Sequence[AdapterCard], *, alive: bool
    ) -> Iterator[Metric]:
        """By what the engine said last; ``cards`` have the names of its adapters."""
        yield from self._engine_families(stats, alive)
        yield from self._tenant_families(stats)
        yield from self._lora_families(stats, cards)
        yield from self._device_families(stats)

    def _engine_families(self, stats: EngineStats, alive: bool) -> Iterator[Metric]:
        total = stats.kv_pages_total
        used = stats.kv_pages_used / total if total else 0.0
        gauge, counter = self._one.gauge, self._one.counter
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
            "vllm:iteration_tokens_total", "Tokens computed in an engine step.", labels=LABELS
        )
        step.add_metric(
            self._one.values, _cumulated(STEP_TOKENS, stats.steps_by_tokens), stats.n_step_tokens
        )
        yield step
        yield counter("loraplex_engine_steps", "Forward passes of the engine.", stats.n_steps)
        yield gauge("loraplex_engine_up", "1 while the engine lives.", float(alive))
        age = stats.step_age_s
        yield gauge("loraplex_engine_step_age_seconds", "Since the engine last moved.", age)

    def _tenant_families(self, stats: EngineStats) -> Iterator[Metric]:
        """The first tenants that came have their own series, all others share one."""
        yield self._one.counter(
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
        yield self._one.gauge(
            "vllm:num_gpu_loaded_lora_adapters", "Adapters in device memory.", len(resident)
        )
        yield self._one.gauge(
            "vllm:num_cpu_loaded_lora_adapters",
            "Adapters in host memory, not on the device.",
            n_host,
        )
        yield self._one.gauge(
            "vllm:max_gpu_lora_adapters",
            "Distinct adapters that one step may use.",
            stats.pool_slots_total,
        )

    def _device_families(self, stats: EngineStats) -> Iterator[Metric]:
        counter = self._one.counter
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


def names_by_digest(cards: Sequence[AdapterCard]) -> Mapping[str, str]:
    return {card.digest: card.name for card in cards}


def _joined(names: Mapping[str, str], digests: Sequence[str]) -> str:
    """Routers split this label on commas; mixtures and retired revisions have no name."""
    return ",".join(names[digest] for digest in digests if digest in names)


def _cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: (upper bound, observations up to it), the last +Inf."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))
