"""Snapshots of several engines, put together to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from loraplex_server.engine.client import EngineStats, TenantStats

__all__ = ["summed"]

_SUMMED = (
    *(
        "n_running",
        "n_waiting",
        "max_batch_size",
        "kv_pages_used",
        "kv_pages_total",
        "n_steps",
        "n_step_tokens",
    ),
    *("n_preemptions", "n_rows_taken_back", "n_forced_tokens", "prefix_queries", "prefix_hits"),
    *("pool_bytes_used", "pool_bytes_total", "pool_slots_used", "pool_slots_total"),
    *("n_adapter_loads", "n_adapter_evictions", "adapter_load_seconds"),
)


def summed(engines: Sequence[EngineStats]) -> EngineStats:
    """Counts and bytes add up, digests are joined; ``step_age_s`` is that of the slowest."""
    if not engines:
        return EngineStats()
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    tenants: dict[str, list[TenantStats]] = {}
    for engine in engines:
        running.update(engine.running_adapters)
        waiting.update(engine.waiting_adapters)
        n_bytes.update(engine.resident_bytes)
        for share in engine.tenants:
            tenants.setdefault(share.tenant, []).append(share)
    return EngineStats(
        **{name: sum(getattr(engine, name) for engine in engines) for name in _SUMMED},
        steps_by_tokens=tuple(map(sum, zip(*(e.steps_by_tokens for e in engines), strict=True))),
        tenants=tuple(
            TenantStats(name, *map(sum, zip(*(share[1:] for share in shares), strict=True)))
            for name, shares in tenants.items()
        ),
        running_adapters=running,
        waiting_adapters=waiting,
        resident_adapters=tuple({d: None for e in engines for d in e.resident_adapters}),
        resident_bytes=n_bytes,
        resident_load_s={d: s for e in engines for d, s in e.resident_load_s.items()},
        step_age_s=max(engine.step_age_s for engine in engines),
    )
