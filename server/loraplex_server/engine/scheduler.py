"""What runs in the next step: running requests first, then new ones, within a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .kv_cache import KvCache
from .page_pool import prefix_root
from .request import Request, RequestStatus
from .wait_queue import Admission, WaitQueue

__all__ = ["ScheduledChunk", "Scheduler"]

MAX_BYPASS = 32


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
        *,
        max_batch_size: int,
        max_step_tokens: int,
        ensure_resident: Callable[[Request], Admission],
        on_admit: Callable[[Request, bool], None],
        on_leave: Callable[[Request], None],
    ) -> None:
        """``ensure_resident`` asks for the adapter's place on the device (ADMITTED = resident now);
        ``on_admit(request, first)`` and ``on_leave`` bracket each stay among the running."""
        self.running: list[Request] = []  # by admission, oldest first
        self.waiting = WaitQueue(max_bypass=MAX_BYPASS)
        self.n_preemptions = 0
        self._kv = kv_cache
        self._max_batch_size = max_batch_size
        self._max_step_tokens = max_step_tokens
        self._ensure_resident = ensure_resident
        self._on_admit = on_admit
        self._on_leave = on_leave

    def add(self, request: Request) -> None:
        self.waiting.push(request)

    def schedule(self) -> list[ScheduledChunk]:
        """The chunks of the next step; empty if nothing can run."""
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
        return chunks + self._admit(self._max_step_tokens - sum(c.n_tokens for c in chunks))

    def commit(self, chunks: Sequence[ScheduledChunk]) -> None:
        """The step ran: its tokens have KV now."""
        for chunk in chunks:
            request = chunk.request
            if request.status is RequestStatus.RUNNING:
                request.n_computed = chunk.start + chunk.n_tokens
                if not request.source.sampling.prompt_logprobs:
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
        self._on_leave(request)

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
        sampling = request.source.sampling
        root = prefix_root(request.adapter_digest, request.source.cache_salt)
        n_cached = self._kv.admit(
            request.id, root, request.token_ids, reuse=not sampling.prompt_logprobs
        )
        if n_cached is None:
            return Admission.NO_ROOM
        first = request.admitted_at is None
        request.advance(RequestStatus.RUNNING)
        request.n_computed = n_cached
        if first:
            request.n_cached = min(n_cached, request.n_prompt)
        self.running.append(request)
        self._on_admit(request, first)
        return Admission.ADMITTED
