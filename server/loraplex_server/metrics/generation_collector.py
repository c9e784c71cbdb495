"""Generation in /metrics: what became of the descriptions, and how long they took."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_server.adapters.generated_adapters import GeneratedAdapters

__all__ = ["GenerationCollector"]


class GenerationCollector(Collector):
    def __init__(self, generated: GeneratedAdapters) -> None:
        self._generated = generated

    def collect(self) -> Iterator[Metric]:
        stats = self._generated.stats
        orders = CounterMetricFamily(
            "loraplex_generations", "Descriptions, by what became of them.", labels=("outcome",)
        )
        orders.add_metric(("made",), stats.n_made)
        orders.add_metric(("reused",), stats.n_reused)
        orders.add_metric(("refused",), stats.n_refused)
        yield orders
        seconds = SummaryMetricFamily(
            "loraplex_generation_seconds", "Description to registered adapter."
        )
        seconds.add_metric((), stats.n_made, stats.seconds)
        yield seconds
