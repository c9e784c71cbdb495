"""What a step and a load take on one replica: fitted to a real server, kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class LoadCost:
    """Of bringing an adapter one tier nearer, in milliseconds."""

    ms: float
    ms_per_mb: float

    def of(self, n_bytes: int) -> float:
        return self.ms + self.ms_per_mb * n_bytes / 1e6


@dataclass(frozen=True, slots=True)
class Costs:
    """In milliseconds. A step of n decode rows and p prefill tokens takes

    ``step_ms + row_ms · n + prefill_token_ms · p + rank_row_ms · Σ ranks of the n rows``.
    """

    step_ms: float
    row_ms: float
    prefill_token_ms: float
    rank_row_ms: float
    overhead_ms: float  # of a request outside the engine: HTTP, template, tokenising
    host_to_device: LoadCost
    disk_to_host: LoadCost

    def step(self, n_rows: int, n_ranks: int, n_prefill: int) -> float:
        return (
            self.step_ms
            + self.row_ms * n_rows
            + self.prefill_token_ms * n_prefill
            + self.rank_row_ms * n_ranks
        )

    def requests_per_s(self, n_prompt: float, n_output: float, capacity: int) -> float:
        """What one replica serves at most, its places full and its adapters on the device."""
        step = self.step_ms / capacity + self.row_ms
        return 1000 / (n_prompt * self.prefill_token_ms + n_output * step)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Costs:
        """Raises KeyError or TypeError when a cost is missing or unknown."""
        rest = {k: v for k, v in values.items() if k not in ("host_to_device", "disk_to_host")}
        return Costs(
            **rest,
            host_to_device=LoadCost(**values["host_to_device"]),
            disk_to_host=LoadCost(**values["disk_to_host"]),
        )

    @staticmethod
    def load(path: Path) -> Costs:
        return Costs.from_json(json.loads(path.read_text())["costs"])
