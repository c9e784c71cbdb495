"""Every family of `/metrics`, from the registry that the page is written from."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from .tables import cell, table

__all__ = ["metrics_page"]

_HEAD = """# Metrics

What `GET /metrics` tells Prometheus. Names that begin with `vllm:` are vLLM's, so that its
dashboards work. Which of them to watch: [deployment](../deployment.md#monitoring).
"""


def metrics_page(registry: CollectorRegistry) -> str:
    rows = [
        (f"`{_name(family)}`", family.type, _labels(family), cell(family.documentation))
        for family in sorted(registry.collect(), key=lambda family: family.name)
    ]
    return "\n".join([_HEAD, *table(("name", "kind", "labels", ""), rows)])


def _name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def _labels(family: Metric) -> str:
    own = tuple(getattr(family, "_labelnames", ()))
    seen = {label for sample in family.samples for label in sample.labels}
    return ", ".join(f"`{label}`" for label in (*own, *sorted(seen - {*own, "le"})))
