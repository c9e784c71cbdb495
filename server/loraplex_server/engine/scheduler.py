"""What runs in the next step: running requests first, then new ones, within a token budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from loraplex_adapter_store.plan import AdapterPlan, PrefixPlan

from .device_pool import Placement
from .errors import EngineError
from .kv_cache import KvCache
from .page_pool import prefix_root
from .request import Request, RequestStatus
from .wait_queue import Admission, WaitQueue

__all__ = ["AdapterPlaces", "Schedule", "ScheduledChunk", "Scheduler"]

MAX_BYPASS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens [start, start + n_tokens) of one request in a step."""

    request: Request
    start: int
    n_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the request's last known token, so that a new one comes out."""
        return self.start + self.n_tokens == self.request.n_tokens


class Schedule(NamedTuple):
    chunks: list[ScheduledChunk]  # empty if nothing can run
    n_first_admitted: int  # requests that left the queue for the first time
    failed: list[tuple[Request, EngineError]]  # their adapters cannot be placed; to be finished


class AdapterPlaces(Protocol):
    """Places of adapters on the device, as ``DevicePool`` has them."""

    def place(self, plan: AdapterPlan) -> Placement:
        """Brings it to the device. Raises EngineError if that cannot be."""

    def hold(self, digest: str) -> None:
        """Once for each running request: it stays where it is."""

    def release(self, digest: str) -> None: ...

    def prefix(self, digest: str) -> PrefixPlan | None:
        """Of a held adapter, on the device."""


class Scheduler:
    """Owner of request status and tokens. Engine thread only.

    A step is decided as: one token for each decoding request, oldest first; then the rest of the
    token budget to requests still prefilling, oldest first; then new admissions. When a decoding
    request finds no page, the youngest running request is preempted: its pages go, its tokens stay,
    and it is computed again from the front of the queue.
    """

    def __init__(
        self,
        kv_cache: KvCache,
        adapters: AdapterPlaces,
        *,
        max_batch_size: int,
        max_step_tokens: int,
    ) -> None:
        self.running: list[Request] = []  # by admission, oldest first
        self.waiting = WaitQueue(max_bypass=MAX_BYPASS)
        self.n_preemptions = 0
        self._kv = kv_cache
        self._adapters = adapters
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._n_first_admitted = 0  # since the last schedule
        # By request id: prefetch and admission may both find out in one step.
        self._failed: dict[str, tuple[Request, EngineError]] = {}

    def add(self, request: Request) -> None:
        self.waiting.push(request)

    def prefetch(self, n_requests: int) -> None:
        """Starts the loads of the adapters that the next requests in the queue need."""
        for request in self.waiting.upcoming(n_requests):
            self._ensure_resident(request)

    def schedule(self) -> Schedule:
        """The chunks of the next step, and the waiting requests that can never run."""
        budget = self._max_step_tokens
        chunks: list[ScheduledChunk] = []
        decoding_first = sorted(self.running, key=lambda r: r.n_tokens - r.n_computed > 1)
        for request in decoding_first:
            if request.status is not RequestStatus.RUNNING or budget == 0:
                continue
            if not self._make_room(request):
                continue
            n_tokens = min(request.n_tokens - request.n_computed, budget)
            chunks.append(ScheduledChunk(request, request.n_computed, n_tokens))
            budget -= n_tokens
        # a request preempted after its chunk was planned takes the chunk with it
        chunks = [chunk for chunk in chunks if chunk.request.status is RequestStatus.RUNNING]
        chunks += self._admit(self._max_step_tokens - sum(c.n_tokens for c in chunks))
        scheduled = Schedule(chunks, self._n_first_admitted, list(self._failed.values()))
        self._n_first_admitted = 0
        self._failed.clear()
        return scheduled

    def commit(self, chunks: Sequence[ScheduledChunk]) -> None:
        """The step ran: its tokens have KV now."""
        for chunk in chunks:
            request = chunk.request
            if request.status is RequestStatus.RUNNING:
                request.n_computed = chunk.start + chunk.n_tokens
                if not request.source.reads_all_rows:
                    self._kv.publish(request.id, request.token_ids, request.n_computed)

    def finish(self, request: Request) -> None:
        """Takes a request out wherever it is and frees what it holds."""
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        request.advance(RequestStatus.FINISHED)

    def _make_room(self, request: Request) -> bool:
        """Pages for all known tokens of a running request, preempting younger ones if need be."""
        while not self._kv.extend(request.id, request.n_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request) -> None:
        self._leave(victim)
        victim.n_computed = 0
        victim.n_preempted += 1
        self.n_preemptions += 1
        victim.advance(RequestStatus.WAITING)
        self.waiting.push_front(victim)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._kv.release(request.id)
        if request.adapter_digest:
            self._adapters.release(request.adapter_digest)

    def _admit(self, budget: int) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        n_left = budget

        def try_admit(request: Request) -> Admission:
            nonlocal n_left
            if n_left <= 0 or len(self.running) >= self._max_batch_size:
                return Admission.NO_ROOM
            answer = self._admit_one(request)
            if answer is Admission.ADMITTED:
                n_tokens = min(request.n_tokens - request.n_computed, n_left)
                chunks.append(ScheduledChunk(request, request.n_computed, n_tokens))
                n_left -= n_tokens
            return answer

        if len(self.waiting):
            self.waiting.admit(try_admit)
        return chunks

    def _admit_one(self, request: Request) -> Admission:
        # one spare page for each running request, so that an admission does not preempt at once
        spare = len(self.running) if self.running else 0
        needed = self._kv.pages_for(request.n_tokens) + spare
        if self.running and needed > self._kv.n_pages_available:
            return Admission.NO_ROOM
        answer = self._ensure_resident(request)
        if answer is not Admission.ADMITTED:
            return answer
        root = prefix_root(request.adapter_digest, request.source.cache_salt)
        n_cached = self._kv.admit(
            request.id, root, request.token_ids, reuse=not request.source.reads_all_rows
        )
        if n_cached is None:
            return Admission.NO_ROOM
        try:
            self._start(request, n_cached)
        except Exception as error:  # ``finish`` gives back what it holds by now
            _log.exception("request %s cannot be started", request.id)
            failed = EngineError(f"the request could not be started ({type(error).__name__})")
            self._failed[request.id] = (request, failed)
            return Admission.FAILED
        return Admission.ADMITTED

    def _start(self, request: Request, n_cached: int) -> None:
        """From the queue to the running ones, with pages and, for its adapter, a hold."""
        if request.admitted_at is None:
            self._n_first_admitted += 1
            request.n_cached = min(n_cached, request.n_prompt)
        request.advance(RequestStatus.RUNNING)
        request.n_computed = n_cached
        self.running.append(request)
        digest = request.adapter_digest
        if not digest:
            return
        self._adapters.hold(digest)
        prefix = self._adapters.prefix(digest)
        if prefix is not None and prefix.keys and n_cached < request.n_virtual:
            self._kv.write_prefix(request.id, prefix.keys, prefix.values)
            request.n_computed = request.n_virtual

    def _ensure_resident(self, request: Request) -> Admission:
        """Whether the request's adapter is on the device. If not, starts a load if it can."""
        adapter = request.source.adapter
        if adapter is None:
            return Admission.ADMITTED
        if request.id in self._failed:
            return Admission.FAILED
        try:
            return _ADMISSIONS[self._adapters.place(adapter.plan)]
        except EngineError as error:
            self._failed[request.id] = (request, error)
            return Admission.FAILED


_ADMISSIONS = {
    Placement.RESIDENT: Admission.ADMITTED,
    Placement.LOADING: Admission.LOADING,
    Placement.FULL: Admission.NO_ADAPTER_PLACE,
}
