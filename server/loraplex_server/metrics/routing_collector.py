"""Routing in /metrics: expert load by adapter, and what ``auto`` decided."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.engine.expert_monitor import ExpertMonitor

__all__ = ["RoutingCollector"]

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
            yield from self._expert_families(self._experts)
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

    def _expert_families(self, experts: ExpertMonitor) -> Iterator[Metric]:
        entropy = GaugeMetricFamily(
            "loraplex_expert_entropy", "Of expert use, 0 to 1, last minute.", labels=("adapter",)
        )
        imbalance = GaugeMetricFamily(
            "loraplex_expert_imbalance", "Busiest expert over the mean.", labels=("adapter",)
        )
        share = GaugeMetricFamily(
            "loraplex_expert_load", "Share of rows, last minute.", labels=("adapter", "expert")
        )
        digests = experts.digests()[:_MAX_ADAPTERS]
        names = {card.digest: card.name for card in self._store.seen()} if digests else {}
        for digest in digests:
            load = experts.load(digest, _WINDOW_S)
            if load is None or not load.n_rows or digest not in names:
                continue
            entropy.add_metric((names[digest],), load.entropy)
            imbalance.add_metric((names[digest],), load.imbalance)
            room = _MAX_LOAD_SERIES - len(share.samples)
            for expert, count in enumerate(load.per_expert[:room]):
                share.add_metric((names[digest], str(expert)), count / load.n_rows)
        yield from (entropy, imbalance, share)
