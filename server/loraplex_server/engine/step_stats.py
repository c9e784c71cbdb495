"""Counters of the steps, and the snapshot of the engine that other threads read."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from .client import STEP_TOKENS, EngineStats
from .device_pool import DevicePool
from .kv_cache import KvCache
from .scheduler import ScheduledChunk, Scheduler

__all__ = ["StepStats"]


class StepStats:
    """The engine thread counts; any thread reads ``latest``, which is replaced whole."""

    def __init__(self, scheduler: Scheduler, kv_cache: KvCache, adapters: DevicePool) -> None:
        self._scheduler = scheduler
        self._kv = kv_cache
        self._adapters = adapters
        self._n_step_tokens = 0
        self._n_forced_tokens = 0
        self._steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self.latest: EngineStats
        self.after_step(())  # sizes are known before the first step: routers ask for them

    def forced(self, n_tokens: int) -> None:
        """A grammar fixed so many tokens of an answer."""
        self._n_forced_tokens += n_tokens

    def after_step(self, chunks: Sequence[ScheduledChunk]) -> None:
        if chunks:
            n_tokens = sum(chunk.n_tokens for chunk in chunks)
            self._n_step_tokens += n_tokens
            self._steps_by_tokens[bisect_left(STEP_TOKENS, n_tokens)] += 1
        scheduler, adapters = self._scheduler, self._adapters
        self.latest = EngineStats(
            n_running=len(scheduler.running),
            n_waiting=len(scheduler.waiting),
            max_batch_size=scheduler.max_batch_size,
            kv_pages_used=self._kv.n_pages_held,
            kv_pages_total=self._kv.n_pages,
            n_steps=sum(self._steps_by_tokens),
            n_step_tokens=self._n_step_tokens,
            steps_by_tokens=tuple(self._steps_by_tokens),
            n_preemptions=scheduler.n_preemptions,
            n_rows_taken_back=scheduler.n_rows_taken_back,
            tenants=scheduler.waiting.stats(),
            n_forced_tokens=self._n_forced_tokens,
            prefix_queries=self._kv.n_queried,
            prefix_hits=self._kv.n_found,
            pool_bytes_used=adapters.pool.bytes_used,
            pool_bytes_total=adapters.pool.bytes_total,
            pool_slots_used=adapters.pool.n_slots_used,
            pool_slots_total=adapters.pool.n_slots,
            n_adapter_loads=adapters.n_loads,
            n_adapter_evictions=adapters.n_evictions,
            adapter_load_seconds=adapters.load_seconds,
            running_adapters=Counter(r.adapter_digest for r in scheduler.running),
            waiting_adapters=Counter(r.adapter_digest for r in scheduler.waiting),
            resident_adapters=adapters.resident_digests,
            resident_bytes=adapters.resident_bytes,
            resident_load_s=adapters.resident_load_s,
        )
