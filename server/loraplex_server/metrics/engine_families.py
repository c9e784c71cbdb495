"""Metric families of one engine: requests, KV cache, steps, tenants, adapters on the device."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.memory.kv_cache import PAGE_SIZE
from loraplex_server.engine.requests.client import STEP_TOKENS, EngineStats, TenantStats

from .adapter_usage import OTHER
from .families import HELP, LABELS, counter, gauge, states, summary

_MAX_RESIDENCY_SERIES = 128  # of vllm:lora_adapter_loaded, whose help text names the number
_MAX_TENANTS = 50


def _kv_share(stats: EngineStats) -> float:
    return stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0


# name → the value of the metric
_GAUGES: dict[str, Callable[[EngineStats], float]] = {
    "vllm:num_requests_running": lambda stats: stats.n_running,
    "vllm:num_requests_waiting": lambda stats: stats.n_waiting,
    "vllm:kv_cache_usage_perc": _kv_share,
    "vllm:gpu_cache_usage_perc": _kv_share,
    "loraplex_engine_step_age_seconds": lambda stats: stats.step_age_s,
    "vllm:num_gpu_loaded_lora_adapters": lambda stats: len(set(stats.resident_adapters)),
    "vllm:max_gpu_lora_adapters": lambda stats: stats.pool_slots_total,
}
_COUNTERS: dict[str, Callable[[EngineStats], float]] = {
    "vllm:prefix_cache_queries": lambda stats: stats.prefix_queries,
    "vllm:prefix_cache_hits": lambda stats: stats.prefix_hits,
    "loraplex_prefix_cache_restored": lambda stats: stats.prefix_restored,
    "vllm:num_preemptions": lambda stats: stats.n_preemptions,
    "loraplex_forced_tokens": lambda stats: stats.n_jump_forward_tokens,
    "vllm:spec_decode_num_drafts": lambda stats: stats.n_drafts,
    "vllm:spec_decode_num_draft_tokens": lambda stats: stats.n_drafted_tokens,
    "vllm:spec_decode_num_accepted_tokens": lambda stats: stats.n_accepted_tokens,
    "loraplex_engine_steps": lambda stats: stats.n_steps,
    "loraplex_rows_taken_back": lambda stats: stats.n_fairness_preemptions,
    "loraplex_adapter_loads": lambda stats: stats.n_adapter_loads,
    "loraplex_adapter_evictions": lambda stats: stats.n_adapter_evictions,
}


def engine_families(
    stats: EngineStats,
    cards: Sequence[AdapterCard],
    config: EngineConfig,
    server: tuple[str, str],
    *,
    alive: bool,
) -> Iterator[Metric]:
    """Return all families. ``cards`` name the adapters, ``server`` fills ``LABELS``."""
    for name, value in _GAUGES.items():
        yield gauge(name, LABELS, [(server, value(stats))])
    for name, value in _COUNTERS.items():
        yield counter(name, LABELS, [(server, value(stats))])
    yield gauge("loraplex_engine_up", LABELS, [(server, float(alive))])
    lost = [((each.what, each.layers), 1.0) for each in stats.lost_at_start]
    yield gauge("loraplex_lost_at_start", ("what", "layers"), lost)
    yield from _cache_and_step_families(stats, config, server)
    yield from _tenant_families(stats)
    n_host = sum(1 for card in cards if card.n_bytes.host)
    yield gauge("vllm:num_cpu_loaded_lora_adapters", LABELS, [(server, n_host)])
    yield from _lora_families(stats, cards)


def _cache_and_step_families(
    stats: EngineStats, config: EngineConfig, server: tuple[str, str]
) -> Iterator[Metric]:
    total = stats.kv_pages_total
    yield states("loraplex_kv_pages", used=stats.kv_pages_used, total=total)
    dtype = config.kv_cache_dtype
    geometry = (str(PAGE_SIZE), str(total), dtype, str(config.prefix_cache), "0")
    labels = ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "engine")
    yield gauge("vllm:cache_config_info", labels, [(geometry, 1.0)])
    name = "vllm:iteration_tokens_total"
    step = HistogramMetricFamily(name, HELP[name], labels=LABELS)
    buckets = _cumulated(STEP_TOKENS, stats.steps_by_tokens)
    step.add_metric(server, buckets, stats.n_step_tokens)
    yield step
    used, total = stats.pool_bytes_used, stats.pool_bytes_total
    yield states("loraplex_adapter_pool_bytes", used=used, total=total)
    loads = ((), stats.n_adapter_loads, stats.adapter_load_seconds)
    yield summary("loraplex_adapter_device_load_seconds", (), [loads])


def _tenant_families(stats: EngineStats) -> Iterator[Metric]:
    """Return the families of tenants. Beyond 50 tenants, the others share one series."""
    shown, others = stats.tenants[:_MAX_TENANTS], stats.tenants[_MAX_TENANTS:]
    if others:
        sums = map(sum, zip(*(share[1:] for share in others), strict=True))
        shown += (TenantStats(OTHER, *sums),)
    running = [((share.tenant, "running"), share.n_running) for share in shown]
    waiting = [((share.tenant, "waiting"), share.n_waiting) for share in shown]
    yield gauge("loraplex_tenant_requests", ("tenant", "state"), [*running, *waiting])
    waits = [((share.tenant,), share.n_admitted, share.n_steps_queued) for share in shown]
    yield summary("loraplex_tenant_queue_steps", ("tenant",), waits)


def _lora_families(stats: EngineStats, cards: Sequence[AdapterCard]) -> Iterator[Metric]:
    names = names_by_digest(cards)
    resident = set(stats.resident_adapters)
    running = _joined(names, sorted(resident | set(stats.running_adapters)))
    waiting = _joined(names, [each for each in stats.waiting_adapters if each not in resident])
    row = ((str(stats.pool_slots_total), running, waiting), time.time())
    labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    yield gauge("vllm:lora_requests_info", labels, [row])
    on_device = [("gpu", card) for card in cards if card.digest in resident]
    on_host = [("cpu", card) for card in cards if card.n_bytes.host and card.digest not in resident]
    levels = [
        ((card.name, level, str(card.pinned).lower(), str(max(card.ranks, default=0))), 1.0)
        for level, card in [*on_device, *on_host][:_MAX_RESIDENCY_SERIES]
    ]
    yield gauge("vllm:lora_adapter_loaded", ("adapter_name", "level", "pinned", "rank"), levels)


def names_by_digest(cards: Sequence[AdapterCard]) -> Mapping[str, str]:
    return {card.digest: card.name for card in cards}


def _joined(names: Mapping[str, str], digests: Sequence[str]) -> str:
    """Join the names by commas, as routers expect. Mixtures and old revisions have no name."""
    return ",".join(names[digest] for digest in digests if digest in names)


def _cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return Prometheus buckets: (upper bound, observations up to the bound), the last +Inf."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))
