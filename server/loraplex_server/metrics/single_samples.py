"""Metric families of one sample, under the labels of the server."""

from __future__ import annotations

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from .histograms import LABELS

__all__ = ["SingleSamples"]


class SingleSamples:
    def __init__(self, model_name: str) -> None:
        self.values = (model_name, "0")  # of ``LABELS``

    def gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self.values, value)
        return family

    def counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self.values, value)
        return family
