"""Counters of steps, and the snapshot of the engine that other threads read."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from loraplex_server.engine.adapters.device_pool import DevicePool
from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.engine.requests.client import STEP_TOKENS, EngineStats, LostAtStart

from .scheduler import ScheduledChunk, Scheduler


class StepStats:
    """Counters of the engine thread. Any thread may read ``latest``, which is replaced whole."""

    def __init__(self, scheduler: Scheduler, kv_cache: KvCache, adapters: DevicePool) -> None:
        self._scheduler = scheduler
        self._kv = kv_cache
        self._adapters = adapters
        self._n_step_tokens = 0
        self._n_jump_forward_tokens = 0
        self._n_drafts = self._n_drafted = self._n_accepted = 0
        self._steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self.lost_at_start: tuple[LostAtStart, ...] = ()
        self.latest: EngineStats
        self.after_step(())  # routers ask for the sizes before the first step

    def count_jump_forward(self, n_tokens: int) -> None:
        """Counts tokens of an answer that its grammar forced."""
        self._n_jump_forward_tokens += n_tokens

    def count_drafts(self, n_drafted: int, n_accepted: int) -> None:
        """Counts the drafts of a chunk, and those that became tokens of its answer."""
        self._n_drafts += 1
        self._n_drafted += n_drafted
        self._n_accepted += n_accepted

    def after_step(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Counts the step's tokens and replaces ``latest``."""
        if chunks:
            n_tokens = sum(chunk.n_rows for chunk in chunks)
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
            n_fairness_preemptions=scheduler.n_fairness_preemptions,
            tenants=scheduler.waiting.stats(),
            n_jump_forward_tokens=self._n_jump_forward_tokens,
            n_drafts=self._n_drafts,
            n_drafted_tokens=self._n_drafted,
            n_accepted_tokens=self._n_accepted,
            prefix_queries=self._kv.n_queried,
            prefix_hits=self._kv.n_found,
            prefix_restored=self._kv.n_restored,
            pool_bytes_used=adapters.pool.bytes_used,
            pool_bytes_total=adapters.pool.bytes_total,
            pool_slots_used=adapters.pool.n_slots_used,
            pool_slots_total=adapters.pool.n_slots,
            n_adapter_loads=adapters.n_loads,
            n_adapter_evictions=adapters.n_evictions,
            adapter_load_seconds=adapters.load_seconds,
            running_adapters=Counter(r.adapter_digest for r in scheduler.running),
            waiting_adapters=Counter(r.adapter_digest for r in scheduler.waiting),
            resident_adapters=tuple(adapters.resident_bytes),
            resident_bytes=adapters.resident_bytes,
            resident_load_s=adapters.resident_load_s,
            lost_at_start=self.lost_at_start,
        )
