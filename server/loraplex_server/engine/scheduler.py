"""What runs in the next step: running requests first, then new ones, within a token budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from loraplex_adapter_store.plan import AdapterPlan, PrefixPlan

from .device_pool import Placement
from .errors import EngineError
from .kv_cache import KvCache
from .page_pool import prefix_root
from .request import Request, RequestStatus
from .tenant_queue import Admission, TenantQueue
from .wait_queue import WaitQueue

__all__ = ["AdapterPlaces", "Schedule", "ScheduledChunk", "Scheduler"]

MAX_BYPASS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens [start, start + n_tokens) of one request in a step."""

    request: Request
    start: int
    n_tokens: int
    # Whether the step reaches the request's last token, so that a new one comes out.
    samples: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.start + self.n_tokens == self.request.n_tokens)


class Schedule(NamedTuple):
    chunks: list[ScheduledChunk]  # empty if nothing can run
    first_admitted: list[Request]  # that left the queue for the first time
    failed: list[tuple[Request, EngineError]]  # their adapters cannot be placed; to be finished


class AdapterPlaces(Protocol):
    """Places of adapters on the device, as ``DevicePool`` has them."""

    def place(self, plan: AdapterPlan, *, spared: Collection[str] = ()) -> Placement:
        """Brings it to the device, in the place of idle ones, but of no ``spared`` one.

        Raises EngineError if that cannot be.
        """

    def hold(self, digest: str) -> None:
        """Once for each running request: it stays where it is."""

    def release(self, digest: str) -> None: ...

    def is_pinned(self, digest: str) -> bool:
        """Of a held adapter: it keeps its place when nobody holds it any more."""

    def prefix(self, digest: str) -> PrefixPlan | None:
        """Of a held adapter, on the device."""


@dataclass(slots=True)
class _Step:
    """A step while it is decided."""

    n_left: int  # of the token budget
    chunks: dict[str, ScheduledChunk] = field(default_factory=dict)  # by request id
    admitted: set[str] = field(default_factory=set)  # request ids


class Scheduler:
    """Owner of request status and tokens. Engine thread only.

    A step is decided as: one token for each decoding request, oldest first; then the rest of the
    token budget to requests still prefilling, oldest first; then new admissions. When a decoding
    request finds no page, the youngest running request is preempted: its pages go, its tokens stay,
    and it is computed again from the front of the queue.

    With several tenants, those that wait and have no running row are admitted before all this, into
    rows that others give back if need be and with half of the tokens that decoding leaves; age is
    then second to the tenants' counters (see ``wait_queue``).
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
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.n_rows_taken_back = 0  # preemptions for a tenant that had less
        self._n_steps = 0
        self._first_admitted: list[Request] = []  # since the last schedule
        # By request id: prefetch and admission may both find out in one step.
        self._failed: dict[str, tuple[Request, EngineError]] = {}

    def add(self, request: Request) -> None:
        request.n_steps_queued = -self._n_steps
        self.waiting.push(request)

    def prefetch(self, n_requests: int) -> None:
        """Starts the loads of the adapters that the next requests in the queue need.

        As many as have a place together: none is taken from a request before it in the queue.
        """
        sooner: set[str] = set()
        for request in self.waiting.upcoming(n_requests):
            self._ensure_resident(request, spared=sooner)
            sooner.add(request.adapter_digest)

    def schedule(self) -> Schedule:
        """The chunks of the next step, and the waiting requests that can never run."""
        self._n_steps += 1
        step = _Step(self.max_step_tokens)
        if self.running and self.waiting.is_shared and len(self.waiting):
            self._admit_without_row(step)
        for request in self._in_order():
            is_running = request.status is RequestStatus.RUNNING  # not preempted for one before it
            if not is_running or step.n_left == 0 or request.id in step.chunks:
                continue
            if request.is_full or request.n_computed == request.n_tokens:
                continue  # it ends with the step that runs
            if self._make_room(request, step):
                self._plan_chunk(request, step)
        if len(self.waiting):
            self.waiting.admit(lambda request: self._try_admit(request, step))
        chunks = list(step.chunks.values())
        scheduled = Schedule(chunks, self._first_admitted, list(self._failed.values()))
        self._first_admitted = []
        self._failed.clear()
        return scheduled

    def started(self, chunks: Sequence[ScheduledChunk]) -> None:
        """The device has got the step: what is computed from now on comes behind it."""
        for chunk in chunks:
            if chunk.request.status is RequestStatus.RUNNING:
                chunk.request.n_computed = chunk.start + chunk.n_tokens

    def undo_start(self, chunk: ScheduledChunk) -> bool:
        """A started step failed: its chunk has to run again; False if it was preempted since."""
        request = chunk.request
        is_running = request.status is RequestStatus.RUNNING
        if not is_running or request.n_computed != chunk.start + chunk.n_tokens:
            return False
        request.n_computed = chunk.start
        return True

    def commit(self, chunks: Sequence[ScheduledChunk]) -> None:
        """The step ran: its tokens have KV now."""
        for chunk in chunks:
            request, n_computed = chunk.request, chunk.start + chunk.n_tokens
            if request.status is not RequestStatus.RUNNING or request.source.reads_all_rows:
                continue
            if request.n_computed >= n_computed:  # not preempted while the step ran
                self._kv.publish(request.id, request.token_ids, n_computed)
        self.waiting.served(chunk.request for chunk in chunks)

    def finish(self, request: Request) -> None:
        """Takes a request out wherever it is and frees what it holds."""
        ran = request.status is RequestStatus.RUNNING
        if ran:
            self._leave(request)
        self.waiting.ended(request, ran=ran)
        request.advance(RequestStatus.FINISHED)

    def _in_order(self) -> list[Request]:
        """The running requests, those that decode first."""
        if not self.waiting.is_shared:
            return sorted(self.running, key=_is_prefilling)
        counter = self.waiting.counter
        return sorted(self.running, key=lambda r: (_is_prefilling(r), counter(r)))

    def _plan_chunk(self, request: Request, step: _Step) -> None:
        n_tokens = min(request.n_tokens - request.n_computed, step.n_left)
        step.chunks[request.id] = ScheduledChunk(request, request.n_computed, n_tokens)
        step.n_left -= n_tokens

    def _make_room(self, request: Request, step: _Step) -> bool:
        """Pages for all known tokens of a running request, preempting younger ones if need be.

        With several tenants: those of the tenant that has the most rows by weight.
        """
        while not self._kv.extend(request.id, request.n_tokens):
            victim = self.running[-1]
            if self.waiting.is_shared:
                tenant = self.waiting.to_preempt()
                victim = next(r for r in reversed(self.running) if self._is_of(r, tenant))
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, step: _Step) -> None:
        self._leave(victim)
        chunk = step.chunks.pop(victim.id, None)
        step.n_left += 0 if chunk is None else chunk.n_tokens
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

    def _admit_without_row(self, step: _Step) -> None:
        """Tenants that have nothing running, before the others take all tokens of the step."""
        n_decoding = sum(not _is_prefilling(request) for request in self.running)
        kept = step.n_left - max(1, (step.n_left - n_decoding) // 2)
        step.n_left -= kept
        self.waiting.admit(lambda request: self._try_admit(request, step), only_without_row=True)
        step.n_left += kept

    def _try_admit(self, request: Request, step: _Step) -> Admission:
        """Admits it if there is room, or if others give back rows until there is."""
        while step.n_left > 0:
            answer = Admission.NO_ROOM
            if len(self.running) < self.max_batch_size:
                answer = self._admit_one(request)
            if answer is Admission.NO_ROOM and self._rows_to_take_back(request, answer, step):
                placed = self._ensure_resident(request)  # no row goes before its adapter is there
                answer = answer if placed is Admission.ADMITTED else placed
            if answer is Admission.ADMITTED:
                step.admitted.add(request.id)
                self._plan_chunk(request, step)
            if answer not in (Admission.NO_ROOM, Admission.NO_ADAPTER_PLACE):
                return answer
            victims = self._rows_to_take_back(request, answer, step)
            if not victims:
                return answer
            for victim in victims:
                self._preempt(victim, step)
            self.n_rows_taken_back += len(victims)
        return Admission.NO_ROOM

    def _rows_to_take_back(
        self, request: Request, answer: Admission, step: _Step
    ) -> Sequence[Request]:
        """The youngest row of the tenant that has more than its share, or all rows of an adapter
        if its place is what is missing."""
        needs_place = answer is Admission.NO_ADAPTER_PLACE
        has_none = not self.waiting.tenant_of(request).n_running
        if needs_place and has_none and (rows := self._rows_of_a_place()):
            return rows
        for tenant, is_ahead in self.waiting.to_yield(request):
            for row in reversed(self.running):
                if row.id in step.admitted or not self._is_of(row, tenant):
                    continue
                if not needs_place or (is_ahead and self._may_free_place(row)):
                    return (row,)
        return ()

    def _rows_of_a_place(self) -> list[Request]:
        """All rows of one adapter, whose tenants keep other rows; as few as possible."""
        rows_of: dict[str, list[Request]] = {}
        for row in self.running:
            if self._may_free_place(row):
                rows_of.setdefault(row.adapter_digest, []).append(row)
        for rows in sorted(rows_of.values(), key=len):
            n_of = Counter(self.waiting.tenant_of(row) for row in rows)
            if all(tenant.n_running > n for tenant, n in n_of.items()):
                return rows
        return []

    def _may_free_place(self, row: Request) -> bool:
        return bool(row.adapter_digest) and not self._adapters.is_pinned(row.adapter_digest)

    def _is_of(self, request: Request, tenant: TenantQueue) -> bool:
        return self.waiting.tenant_of(request) is tenant

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
        except Exception:  # ``finish`` gives back what it holds by now
            _log.exception("request %s cannot be started", request.id)
            failed = EngineError(
                f"the request could not be started; see the server's log under {request.id}"
            )
            self._failed[request.id] = (request, failed)
            return Admission.FAILED
        return Admission.ADMITTED

    def _start(self, request: Request, n_cached: int) -> None:
        """From the queue to the running ones, with pages and, for its adapter, a hold."""
        n_new = 0
        if request.admitted_at is None:
            self._first_admitted.append(request)
            request.n_steps_queued += self._n_steps
            request.n_cached = min(n_cached, request.n_prompt)
            n_new = request.n_prompt - request.n_cached
        request.advance(RequestStatus.RUNNING)
        request.n_computed = n_cached
        self.running.append(request)
        self.waiting.started(request, n_new)
        digest = request.adapter_digest
        if not digest:
            return
        self._adapters.hold(digest)
        prefix = self._adapters.prefix(digest)
        if prefix is not None and prefix.keys and n_cached < request.n_virtual:
            self._kv.write_prefix(request.id, prefix.keys, prefix.values)
            request.n_computed = request.n_virtual

    def _ensure_resident(self, request: Request, *, spared: Collection[str] = ()) -> Admission:
        """Whether the request's adapter is on the device. If not, starts a load if it can."""
        adapter = request.source.adapter
        if adapter is None:
            return Admission.ADMITTED
        if request.id in self._failed:
            return Admission.FAILED
        try:
            return _ADMISSIONS[self._adapters.place(adapter.plan, spared=spared)]
        except EngineError as error:
            self._failed[request.id] = (request, error)
            return Admission.FAILED


def _is_prefilling(request: Request) -> bool:
    return request.n_tokens - request.n_computed > 1


_ADMISSIONS = {
    Placement.RESIDENT: Admission.ADMITTED,
    Placement.LOADING: Admission.LOADING,
    Placement.FULL: Admission.NO_ADAPTER_PLACE,
}
