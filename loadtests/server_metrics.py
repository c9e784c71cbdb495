"""Samples /metrics, memory and open files of a server under load."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

_METRICS = {  # our key → (sample, value of the label `state`)
    "resident_adapters": ("vllm:num_gpu_loaded_lora_adapters", ""),
    "host_adapters": ("vllm:num_cpu_loaded_lora_adapters", ""),
    "pool_bytes": ("loraplex_adapter_pool_bytes", "used"),
    "host_bytes": ("loraplex_host_tier_bytes", "used"),
    "running": ("vllm:num_requests_running", ""),
    "waiting": ("vllm:num_requests_waiting", ""),
    "loads": ("loraplex_adapter_loads_total", ""),
    "evictions": ("loraplex_adapter_evictions_total", ""),
}


@dataclass(frozen=True, slots=True)
class MetricsSample:
    """Values of one moment; None where unknown."""

    at: float  # seconds since the sampler was made
    phase: str
    rss_bytes: int | None
    open_files: int | None
    values: Mapping[str, float]  # by the keys of _METRICS


class MetricsSampler:
    """A sampler of one server. ``failure`` says why /metrics could not be read."""

    def __init__(self, client: httpx.Client, pid: int | None) -> None:
        """``pid`` of a server on this machine, else None."""
        self.samples: list[MetricsSample] = []
        self.failure: str | None = None
        self._client = client
        self._process = psutil.Process(pid) if pid else None
        self._began = time.perf_counter()

    def sample(self, phase: str) -> None:
        rss = files = None
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                rss, files = self._process.memory_info().rss, self._process.num_fds()
        at = round(time.perf_counter() - self._began, 2)
        self.samples.append(MetricsSample(at, phase, rss, files, self._read()))

    def of_phase(self, label: str) -> list[MetricsSample]:
        return [sample for sample in self.samples if sample.phase == label]

    def _read(self) -> dict[str, float]:
        try:
            response = self._client.get("/metrics")
        except httpx.HTTPError as error:
            self.failure = self.failure or f"GET /metrics: {error!r}"
            return {}
        if response.status_code != 200:
            self.failure = self.failure or f"GET /metrics answered {response.status_code}"
            return {}
        found = {
            (sample.name, sample.labels.get("state", "")): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        return {key: found[sample] for key, sample in _METRICS.items() if sample in found}


def summarize(samples: Sequence[MetricsSample]) -> dict[str, Any]:
    """Return loads and evictions of a phase, and memory and open files at six moments.

    The moments are evenly spaced from its beginning to its end, so growth can be seen.
    """
    result: dict[str, Any] = {}
    for key in ("loads", "evictions"):
        counts = [sample.values[key] for sample in samples if key in sample.values]
        if counts:
            result[f"adapter_{key}"] = round(counts[-1] - counts[0])
    rss = [sample.rss_bytes >> 20 for sample in samples if sample.rss_bytes]
    files = [sample.open_files for sample in samples if sample.open_files]
    for name, values in (("rss_mib", rss), ("open_files", files)):
        if values:
            result[name] = [values[round(k / 5 * (len(values) - 1))] for k in range(6)]
    return result
