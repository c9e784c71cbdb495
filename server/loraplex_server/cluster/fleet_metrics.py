"""/metrics of a cluster: what every gateway counted and every engine said, on one page.

Each sample has the label ``replica``, the process that it is of. Whichever gateway is asked, the
page is the same, so a scraper needs one address.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["ProcessMetrics", "one_page"]

_LABEL = "replica"


class ProcessMetrics(NamedTuple):
    replica: str
    families: Sequence[Metric]


def one_page(processes: Iterable[ProcessMetrics]) -> bytes:
    """In the text format of Prometheus; a family stands there once, whoever has samples of it."""
    merged: dict[str, Metric] = {}
    for process in processes:
        for family in process.families:
            target = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            target.samples += [
                sample._replace(labels={**sample.labels, _LABEL: process.replica})
                for sample in family.samples
            ]
    return generate_latest(_Page(merged.values()))


class _Page(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
