"""The current state of the server as one JSON value, for the console and for ``watch curl``."""

import time
from collections import deque
from collections.abc import Mapping
from itertools import islice

from loraplex_adapter_store.store import AdapterStore
from loraplex_server.call_log import percentile
from loraplex_server.engine.requests.client import EngineClient, EngineStats

from .collector import LoraplexCollector
from .engine_families import names_by_digest
from .server_metrics import ServerMetrics

_LEAST_GAP_S = 0.25  # between two readings of the engine, for any number of clients
_RATE_S = 2.0  # window of the token rates
MAX_ROWS = 256
_MAX_NAMES = 512
_N_MOVES = 50  # loads and evictions that are shown


class LiveView:
    """Reads the state at most four times a second. Event loop only.

    Call the collector's ``refresh_listing`` on another thread first.
    """

    def __init__(
        self,
        engine: EngineClient,
        store: AdapterStore,
        metrics: ServerMetrics,
        collector: LoraplexCollector,
    ) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._collector = collector
        self._read_at = float("-inf")
        self._value: dict[str, object] = {}
        self._counts: deque[tuple[float, int, int]] = deque()  # time, prompt and output tokens
        self._resident: frozenset[str] | None = None
        self._moves: deque[dict[str, object]] = deque(maxlen=_N_MOVES)

    def to_json(self) -> dict[str, object]:
        now = time.monotonic()
        if now - self._read_at >= _LEAST_GAP_S:
            self._read_at, self._value = now, self._read(now)
        return self._value

    def _read(self, now: float) -> dict[str, object]:
        stats, store, calls = self._engine.stats(), self._store.stats(), self._metrics.calls
        names = names_by_digest(self._collector.listing)
        self._note_moves(stats, names)
        return {
            "object": "live",
            "time": time.time(),
            "engine": {
                "alive": self._engine.alive,
                "running": stats.n_running,
                "waiting": stats.n_waiting,
                "steps": stats.n_steps,
                "step_age_s": stats.step_age_s,
                "preemptions": stats.n_preemptions,
                "kv_pages": {"used": stats.kv_pages_used, "total": stats.kv_pages_total},
            },
            "tokens_per_s": self._rates(now),
            "first_token_s": percentiles(calls.first_token_s.values()),
            "gap_s": percentiles(calls.gap_s.values()),
            "adapters": {
                "registered": len(self._collector.listing),
                "device": [_name(names, d) for d in stats.resident_adapters[:_MAX_NAMES]],
                "slots": stats.pool_slots_total,
                "host": store.n_host_plans,
                "loads": stats.n_adapter_loads,
                "evictions": stats.n_adapter_evictions,
                "mean_load_s": stats.adapter_load_seconds / max(1, stats.n_adapter_loads),
            },
            "bytes": {
                "device": {"used": stats.pool_bytes_used, "total": stats.pool_bytes_total},
                "host": {"used": store.host_bytes_used, "total": store.host_bytes_total},
                "disk": {"used": store.disk_bytes, "total": None},
            },
            "rows": [record.to_json() for record in islice(calls.running(None), MAX_ROWS)],
            "moves": list(self._moves),
        }

    def _rates(self, now: float) -> dict[str, float]:
        counts = self._counts
        counts.append((now, self._metrics.n_prompt_tokens, self._metrics.n_output_tokens))
        while len(counts) > 2 and now - counts[1][0] >= _RATE_S:
            counts.popleft()
        since, n_prompt, n_output = counts[0]
        seconds = max(now - since, _LEAST_GAP_S)
        return {
            "prompt": (self._metrics.n_prompt_tokens - n_prompt) / seconds,
            "output": (self._metrics.n_output_tokens - n_output) / seconds,
        }

    def _note_moves(self, stats: EngineStats, names: Mapping[str, str]) -> None:
        """Note the loads and evictions since the last reading."""
        resident = frozenset(stats.resident_adapters)
        before = resident if self._resident is None else self._resident
        self._resident = resident
        for kind, digests in (("loaded", resident - before), ("evicted", before - resident)):
            for digest in sorted(digests):
                move = {"time": time.time(), "kind": kind, "adapter": _name(names, digest)}
                self._moves.append(move)


def _name(names: Mapping[str, str], digest: str) -> str:
    """Return the name, or the digest of a mixture or an old revision."""
    return names.get(digest, digest[:12])


def percentiles(values: list[float]) -> dict[str, float | int | None]:
    """Return percentiles of ascending ``values``."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {"n": len(values), **{name: percentile(values, s) for name, s in shares.items()}}
