"""Routing in /metrics: expert load by adapter, and what ``auto`` decided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapter_store.store import AdapterStore
from loraplex_router.experts import ExpertLoad
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.engine.expert_monitor import ExpertMonitor

__all__ = ["RoutingCollector", "expert_families", "recent_loads"]

_WINDOW_S = 60.0
_MAX_ADAPTERS = 16  # the last used
_MAX_LOAD_SERIES = 256  # adapter × expert


class RoutingCollector(Collector):
    """At most 16 adapters and 256 pairs of adapter and expert, whatever is registered."""

    def __init__(
        self, store: AdapterStore, experts: ExpertMonitor | None, semantic: SemanticRouter | None
    ) -> None:
        """``experts``: None where the engine is in other processes."""
        self._store = store
        self._experts = experts
        self._semantic = semantic

    def collect(self) -> Iterator[Metric]:
        if self._experts is not None:
            loads = recent_loads(self._experts)
            names = {card.digest: card.name for card in self._store.seen()} if loads else {}
            yield from expert_families(loads, names)
        if self._semantic is not None:
            stats = self._semantic.stats
            decided = CounterMetricFamily(
                "loraplex_auto_decisions", "Texts given to an adapter or the base.", labels=("to",)
            )
            decided.add_metric(("adapter",), stats.n_chosen)
            decided.add_metric(("base",), stats.n_base)
            yield decided
            yield CounterMetricFamily(
                "loraplex_auto_seconds", "Work of the semantic router.", value=stats.seconds
            )


def recent_loads(experts: ExpertMonitor) -> dict[str, ExpertLoad]:
    """Digest → its last minute, of the adapters that routed last. Any thread."""
    digests = experts.digests()[:_MAX_ADAPTERS]
    loads = {digest: experts.load(digest, _WINDOW_S) for digest in digests}
    return {digest: load for digest, load in loads.items() if load is not None}


def expert_families(loads: Mapping[str, ExpertLoad], names: Mapping[str, str]) -> Iterator[Metric]:
    """Of one engine. ``names``: by digest; what has none is left out."""
    entropy = GaugeMetricFamily(
        "loraplex_expert_entropy", "Of expert use, 0 to 1, last minute.", labels=("adapter",)
    )
    imbalance = GaugeMetricFamily(
        "loraplex_expert_imbalance", "Busiest expert over the mean.", labels=("adapter",)
    )
    share = GaugeMetricFamily(
        "loraplex_expert_load", "Share of rows, last minute.", labels=("adapter", "expert")
    )
    for digest, load in loads.items():
        if not load.n_rows or digest not in names:
            continue
        entropy.add_metric((names[digest],), load.entropy)
        imbalance.add_metric((names[digest],), load.imbalance)
        room = _MAX_LOAD_SERIES - len(share.samples)
        for expert, count in enumerate(load.per_expert[:room]):
            share.add_metric((names[digest], str(expert)), count / load.n_rows)
    yield from (entropy, imbalance, share)
