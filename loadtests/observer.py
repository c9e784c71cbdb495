"""Looks at the server while it is under load: /metrics, resident memory, open files."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from .streaming import Connections

__all__ = ["Observer", "Sight"]

_GAUGES = {
    "resident_adapters": ("vllm:num_gpu_loaded_lora_adapters", {}),
    "host_adapters": ("vllm:num_cpu_loaded_lora_adapters", {}),
    "pool_bytes": ("loraplex_adapter_pool_bytes", {"state": "used"}),
    "host_bytes": ("loraplex_host_tier_bytes", {"state": "used"}),
    "running": ("vllm:num_requests_running", {}),
    "waiting": ("vllm:num_requests_waiting", {}),
    "loads": ("loraplex_adapter_loads_total", {}),
    "evictions": ("loraplex_adapter_evictions_total", {}),
}


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen at one moment; None where the server does not tell."""

    at: float  # seconds since the observer was made
    phase: str
    rss_bytes: int | None
    open_files: int | None
    metrics_ms: float | None  # how long /metrics took, seen from here
    values: dict[str, float]


class Observer:
    def __init__(self, connections: Connections, pid: int | None) -> None:
        self._connections = connections
        self._process = psutil.Process(pid) if pid else None
        self._began = time.perf_counter()
        self.sights: list[Sight] = []

    def look(self, phase: str) -> Sight:
        values, took = self._metrics()
        rss = files = None
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                rss, files = self._process.memory_info().rss, self._process.num_fds()
        at = time.perf_counter() - self._began
        sight = Sight(round(at, 2), phase, rss, files, took, values)
        self.sights.append(sight)
        return sight

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(sight) for sight in self.sights]

    def _metrics(self) -> tuple[dict[str, float], float | None]:
        started = time.perf_counter()
        try:
            status, text = self._connections.send("GET", "/metrics")
        except Exception:  # a server that is down is seen by the requests
            return {}, None
        took = round(1000 * (time.perf_counter() - started), 2)
        if status != 200:
            return {}, None
        found: dict[tuple[str, str], float] = {}
        with contextlib.suppress(ValueError):
            for family in text_string_to_metric_families(text.decode()):
                for sample in family.samples:
                    found[sample.name, sample.labels.get("state", "")] = sample.value
        seen = {
            key: found[name, labels.get("state", "")]
            for key, (name, labels) in _GAUGES.items()
            if (name, labels.get("state", "")) in found
        }
        return seen, took
