"""A scheduler in a loop of steps, with a real KV cache and a "model" that always says 1."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch

from loraplex_adapter_store.plan import AdapterPlan, Family
from loraplex_server.engine.adapters.device_pool import Residency
from loraplex_server.engine.errors import AdapterUnservable
from loraplex_server.engine.memory.kv_cache import KvCache, KvGeometry
from loraplex_server.engine.requests.client import GenerationRequest, TenantShare
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk, Scheduler
from loraplex_server.engine.scheduling.step_cost import StepCost


class _Lease:
    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.plan = AdapterPlan(digest, Family.LORA, {})


class _Adapters:
    """Residency in which every adapter is resident except the named ones, while slots last."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.full: set[str] = set()
        self.loading: set[str] = set()
        self.broken: set[str] = set()
        self.pinned: set[str] = set()  # they stay resident without holders
        self.held: Counter[str] = Counter()
        self.spared: dict[str, set[str]] = {}  # by digest, in the last call

    def ensure_resident(self, plan: AdapterPlan, *, spared: Collection[str] = ()) -> Residency:
        self.spared[plan.digest] = set(spared)
        if plan.digest in self.broken:
            raise AdapterUnservable(f"{plan.digest} is broken")
        if plan.digest in self.loading:
            return Residency.LOADING
        held = {digest for digest, n in self.held.items() if n > 0}
        others = (held | self.pinned) - {plan.digest}
        is_full = plan.digest in self.full or len(others) >= self.n_slots
        return Residency.FULL if is_full else Residency.RESIDENT

    def hold(self, digest: str) -> None:
        self.held[digest] += 1

    def release(self, digest: str) -> None:
        self.held[digest] -= 1

    def is_pinned(self, digest: str) -> bool:
        return digest in self.pinned

    def prefix(self, digest: str) -> None:
        return None


class SchedulerLoop:
    """A scheduler whose "model" appends token 1."""

    def __init__(
        self,
        *,
        n_pages: int = 64,
        max_batch: int = 4,
        max_step: int = 16,
        n_slots: int = 1000,
        kv_token_bytes: int = 16,
        seconds_of: Callable[[Sequence[ScheduledChunk]], float] | None = None,
        max_gap_s: float = math.inf,
    ) -> None:
        """``seconds_of``: what a step takes, for the scheduler's estimate; None: it learns none."""
        self.kv = KvCache(
            KvGeometry(1, 1, 2),
            n_pages=n_pages,
            page_size=4,
            max_requests=max_batch,
            max_model_len=256,
            dtype=torch.float32,
            device=torch.device("cpu"),
            prefix_cache=True,
        )
        self.adapters = _Adapters(n_slots)
        self.admitted: list[str] = []
        self.failed: list[str] = []
        self.n_first_admitted = 0
        self.max_step = max_step
        self.chunks: list[ScheduledChunk] = []  # of the last step
        self._seconds_of = seconds_of
        self.scheduler = Scheduler(
            self.kv,
            self.adapters,
            StepCost(kv_token_bytes),
            max_batch_size=max_batch,
            max_step_tokens=max_step,
            max_gap_s=max_gap_s,
        )

    def add(
        self,
        name: str,
        n_prompt: int = 4,
        max_tokens: int = 4,
        adapter: str = "",
        share: TenantShare = TenantShare(),  # noqa: B008  frozen value
    ) -> Request:
        # the same in each process, unlike ``hash``
        prompt = [zlib.crc32(f"{name} {index}".encode()) % 50 for index in range(n_prompt)]
        source = GenerationRequest(
            name,
            tuple(prompt),
            SamplingParams(max_tokens=max_tokens),
            _Lease(adapter) if adapter else None,
            share=share,
        )
        request = Request(source, print, list(prompt), n_prompt)
        self.scheduler.add(request)
        return request

    def step(self) -> list[str]:
        """Run one step and return the ids of its requests."""
        chunks, first_admitted, failed = self.scheduler.schedule()
        running = [request.id for request in self.scheduler.running]
        self.admitted += [id for id in running if id not in self.admitted]
        self.n_first_admitted += len(first_admitted)
        for request, _ in failed:
            self.scheduler.finish(request)
            self.failed.append(request.id)
        blocks = [block.end - block.first for chunk in chunks for block in chunk.request.blocks]
        assert sum(chunk.n_tokens for chunk in chunks) <= self.max_step + max(blocks, default=0)
        assert len({chunk.request.id for chunk in chunks}) == len(chunks)
        self.chunks = chunks
        if self._seconds_of is not None and chunks:
            self.scheduler.measured(chunks, self._seconds_of(chunks))
        self.scheduler.started(chunks)
        self.scheduler.commit(chunks)
        for chunk in chunks:
            request = chunk.request
            if request.n_computed == request.n_tokens:
                request.token_ids.append(1)
                if request.n_output >= request.source.sampling.max_tokens:
                    self.scheduler.finish(request)
        return [chunk.request.id for chunk in chunks]
