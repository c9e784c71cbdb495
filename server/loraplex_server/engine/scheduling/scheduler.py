"""Chooses the tokens of the next step: running requests first, then new ones."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from loraplex_adapter_store.plan import AdapterPlan, PrefixPlan
from loraplex_server.engine.adapters.device_pool import Residency
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.engine.memory.page_pool import KeyTurn, prefix_root
from loraplex_server.engine.requests.request import Request, RequestStatus

from .step_budget import StepBudget
from .step_cost import StepCost
from .tenant_queue import Admission, TenantQueue
from .wait_queue import WaitQueue

MAX_BYPASS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens [start, start + n_tokens) of one request in a step, and drafts after them."""

    request: Request
    start: int
    n_tokens: int  # without drafts
    drafts: tuple[int, ...] = ()  # guesses of the next tokens; only where the chunk samples
    # The request as it is if the first draft is right, if the first two are right …
    ahead: tuple[Request, ...] = ()
    samples: bool = field(init=False)  # True if a new token follows from this chunk

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.start + self.n_tokens == self.request.n_tokens)

    @property
    def adapter_digest(self) -> str:
        """The digest of the adapter that computes the chunk; empty for the base."""
        return self.request.digest_at(self.start)

    @property
    def n_rows(self) -> int:
        """The rows of the chunk in the step, drafts included."""
        return self.n_tokens + len(self.drafts)

    @property
    def generating(self) -> tuple[Request, ...]:
        """The states to sample a token from, one for each of the chunk's last rows, in order."""
        return (self.request, *self.ahead) if self.samples else ()


class Schedule(NamedTuple):
    chunks: list[ScheduledChunk]  # empty if nothing can run
    first_admitted: list[Request]  # requests that left the queue for the first time
    failed: list[tuple[Request, EngineError]]  # requests that can never run; to be finished


class ResidentAdapters(Protocol):
    """The adapters on the device, as ``DevicePool`` manages them."""

    def ensure_resident(self, plan: AdapterPlan, *, spared: Collection[str] = ()) -> Residency:
        """Loads the adapter if it is absent, evicting idle ones except those in ``spared``.

        Raises EngineError if the adapter cannot become resident.
        """

    def hold(self, digest: str) -> None:
        """Protects the adapter from eviction. Called once for each running request."""

    def release(self, digest: str) -> None: ...

    def is_pinned(self, digest: str) -> bool:
        """Return True if a held adapter stays resident without holders."""

    def prefix(self, digest: str) -> PrefixPlan | None:
        """Return the prefix of a held adapter, on the device."""


@dataclass(slots=True)
class _Step:
    """A step that is being composed."""

    budget: StepBudget
    chunks: dict[str, ScheduledChunk] = field(default_factory=dict)  # by request id
    admitted: set[str] = field(default_factory=set)  # request ids


class Scheduler:
    """Owner of request status and tokens. Engine thread only.

    A step gets one token of each decoding request, oldest first. The rest of the token budget goes
    to prefilling requests, oldest first, and then to new admissions. If a decoding request finds no
    page, the youngest running request is preempted. It loses its pages, keeps its tokens and is
    computed again from the front of the queue.

    With several tenants, those that wait without a running row are admitted first. They get up to
    half of the tokens that decoding leaves, and rows of other tenants if need be. Tenants' counters
    then come before age (see ``wait_queue``).
    """

    def __init__(
        self,
        kv_cache: KvCache,
        adapters: ResidentAdapters,
        cost: StepCost,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        whole_prompts: bool = False,  # see ``StepBudget``
        max_gap_s: float = math.inf,  # see ``step_budget``
    ) -> None:
        self.running: list[Request] = []  # by admission, oldest first
        self.waiting = WaitQueue(max_bypass=MAX_BYPASS)
        self.n_preemptions = 0
        self._kv = kv_cache
        self._adapters = adapters
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self._whole_prompts, self._max_gap_s = whole_prompts, max_gap_s
        self.n_fairness_preemptions = 0  # preemptions in favour of another tenant
        self._cost = cost
        self._n_steps = 0
        self._first_admitted: list[Request] = []  # since the last schedule
        # By request id: prefetch and admission may both fail a request in one step.
        self._failed: dict[str, tuple[Request, EngineError]] = {}

    def add(self, request: Request) -> None:
        """Queues a new request."""
        request.n_steps_queued = -self._n_steps
        self.waiting.push(request)

    def prefetch(self, n_requests: int) -> None:
        """Starts to load the adapters and stored prefixes of the next requests in the queue.

        No adapter evicts one that a request before it needs.
        """
        spared: set[str] = set()
        for request in self.waiting.upcoming(n_requests):
            self._ensure_resident(request, spared=spared)
            self._is_restoring(request)
            spared.add(request.adapter_digest)

    def schedule(self) -> Schedule:
        """Return the next step: its chunks, new admissions and requests that can never run."""
        self._n_steps += 1
        step = _Step(
            StepBudget(
                self.max_step_tokens,
                self._cost,
                whole_prompts=self._whole_prompts,
                max_gap_s=self._max_gap_s,
            )
        )
        if self.waiting.is_shared:
            self._divide(step.budget)
        if self.running and self.waiting.is_shared and len(self.waiting):
            self._admit_without_row(step)
        for request in self._in_order():
            is_running = request.status is RequestStatus.RUNNING  # else preempted just now
            if not is_running or step.budget.n_left == 0 or request.id in step.chunks:
                continue
            if _is_computed(request):
                continue  # the running step ends it
            if self._extend_pages(request, step):
                self._add_chunk(request, step)
        if len(self.waiting):
            self.waiting.admit(lambda request: self._try_admit(request, step))
        step.budget.settle()
        chunks = list(step.chunks.values())
        scheduled = Schedule(chunks, self._first_admitted, list(self._failed.values()))
        self._first_admitted = []
        self._failed.clear()
        return scheduled

    def started(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Marks the chunks as computed: the device runs later steps behind this one."""
        for chunk in chunks:
            if chunk.request.status is RequestStatus.RUNNING:
                chunk.request.n_computed = chunk.start + chunk.n_tokens

    def undo_start(self, chunk: ScheduledChunk) -> bool:
        """Reverts ``started`` for a chunk of a failed step. Return False if it was preempted."""
        request = chunk.request
        is_running = request.status is RequestStatus.RUNNING
        if not is_running or request.n_computed != chunk.start + chunk.n_tokens:
            return False
        request.n_computed = chunk.start
        return True

    def commit(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Publishes the chunks' KV pages, gives up those behind windows, charges the tenants."""
        for chunk in chunks:
            request, n_computed = chunk.request, chunk.start + chunk.n_tokens
            if request.status is not RequestStatus.RUNNING or request.n_computed < n_computed:
                continue  # ended, or preempted while the step ran
            if not request.source.reads_all_rows:
                self._kv.publish(request.id, request.key_ids, n_computed)
            self._kv.slide(request.id, n_computed)
        self.waiting.served(chunk.request for chunk in chunks)

    def measured(self, chunks: Sequence[ScheduledChunk], seconds: float) -> None:
        """Improves the estimate of the seconds that steps take."""
        self._cost.measured(chunks, seconds)

    def finish(self, request: Request) -> None:
        """Removes a request, running or waiting, and frees what it holds."""
        ran = request.status is RequestStatus.RUNNING
        if ran:
            self._leave(request)
        else:
            self._kv.forget(request.id)
        self.waiting.ended(request, ran=ran)
        request.advance(RequestStatus.FINISHED)

    def _in_order(self) -> list[Request]:
        """Return the running requests, decoding ones first.

        Rows that sat out a step come before other rows of their tenant.
        """
        if not self.waiting.is_shared:
            return sorted(self.running, key=_is_prefilling)

        def rank(request: Request) -> tuple[bool, float, int]:
            is_prefilling, counter = _is_prefilling(request), self.waiting.counter(request)
            return is_prefilling, counter, 0 if is_prefilling else request.last_step

        return sorted(self.running, key=rank)

    def _divide(self, budget: StepBudget) -> None:
        """Divides the seconds of a step among the tenants that have work."""
        for request in sorted(self.running, key=_is_prefilling):
            if not _is_computed(request):
                budget.want(self.waiting.tenant_of(request), request)
        for request in self.waiting.heads():
            budget.want(self.waiting.tenant_of(request), request)
        budget.divide()

    def _add_chunk(self, request: Request, step: _Step) -> None:
        start = request.n_computed
        n_tokens = step.budget.take(self.waiting.tenant_of(request), request)
        if n_tokens:
            step.chunks[request.id] = ScheduledChunk(request, start, n_tokens)
            request.last_step = self._n_steps

    def _extend_pages(self, request: Request, step: _Step) -> bool:
        """Reserves pages for all tokens of a running request, preempting younger ones if need be.

        With several tenants, the tenant with the most rows by weight loses its youngest row. Return
        False if the request itself was preempted.
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
        if chunk is not None:
            tenant = self.waiting.tenant_of(victim)
            step.budget.give_back(tenant, chunk.start, chunk.n_tokens)
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
        """Admits tenants without a running row first, so that the step has tokens for them."""
        n_decoding = sum(not _is_prefilling(request) for request in self.running)
        budget = step.budget
        n_reserved = budget.n_left - max(1, (budget.n_left - n_decoding) // 2)
        budget.n_left -= n_reserved
        self.waiting.admit(lambda request: self._try_admit(request, step), only_without_row=True)
        budget.n_left += n_reserved

    def _try_admit(self, request: Request, step: _Step) -> Admission:
        """Admits the request if there is room, preempting rows of other tenants if fair."""
        tenant = self.waiting.tenant_of(request)
        while step.budget.n_left > 0:
            if not step.budget.may_start(tenant):
                return Admission.NO_SHARE
            answer = Admission.NO_ROOM
            if len(self.running) < self.max_batch_size:
                answer = self._admit_one(request)
            if answer is Admission.NO_ROOM and self._rows_to_preempt(request, answer, step):
                residency = self._ensure_resident(request)  # preempts no row before that
                answer = answer if residency is Admission.ADMITTED else residency
            if answer is Admission.ADMITTED:
                step.admitted.add(request.id)
                self._add_chunk(request, step)
            if answer not in (Admission.NO_ROOM, Admission.NO_ADAPTER_SLOT):
                return answer
            victims = self._rows_to_preempt(request, answer, step)
            if not victims:
                return answer
            for victim in victims:
                self._preempt(victim, step)
            self.n_fairness_preemptions += len(victims)
        return Admission.NO_ROOM

    def _rows_to_preempt(
        self, request: Request, answer: Admission, step: _Step
    ) -> Sequence[Request]:
        """Return the youngest row of the tenant that exceeds its share.

        If an adapter slot is missing, these are all rows of one adapter.
        """
        needs_slot = answer is Admission.NO_ADAPTER_SLOT
        has_none = not self.waiting.tenant_of(request).n_running
        if needs_slot and has_none and (rows := self._rows_of_one_adapter()):
            return rows
        for tenant, is_ahead in self.waiting.to_yield(request):
            for row in reversed(self.running):
                if row.id in step.admitted or not self._is_of(row, tenant):
                    continue
                if not needs_slot or (is_ahead and self._may_free_slot(row)):
                    return (row,)
        return ()

    def _rows_of_one_adapter(self) -> list[Request]:
        """Return all rows of an adapter whose tenants keep other rows; as few as possible."""
        rows_of: dict[str, list[Request]] = {}
        for row in self.running:
            if self._may_free_slot(row):
                rows_of.setdefault(row.adapter_digest, []).append(row)
        for rows in sorted(rows_of.values(), key=len):
            n_of = Counter(self.waiting.tenant_of(row) for row in rows)
            if all(tenant.n_running > n for tenant, n in n_of.items()):
                return rows
        return []

    def _may_free_slot(self, row: Request) -> bool:
        return bool(row.adapter_digest) and not self._adapters.is_pinned(row.adapter_digest)

    def _is_of(self, request: Request, tenant: TenantQueue) -> bool:
        return self.waiting.tenant_of(request) is tenant

    def _admit_one(self, request: Request) -> Admission:
        # One spare page for each running request, so that an admission does not preempt at once.
        needed = self._kv.pages_needed(request.n_tokens) + len(self.running)
        if self.running and needed > self._kv.n_pages_available:
            return Admission.NO_ROOM
        answer = self._ensure_resident(request)
        if answer is not Admission.ADMITTED:
            return answer
        if self._is_restoring(request):
            return Admission.LOADING
        n_cached = self._kv.admit(
            request.id,
            _root_of(request),
            request.key_ids,
            reuse=not request.source.reads_all_rows,
            turn=self._turn_of(request),
        )
        if n_cached is None:
            return Admission.NO_ROOM
        try:
            self._start(request, n_cached)
        except Exception:  # ``finish`` frees what it holds by now
            _log.exception("request %s cannot be started", request.id)
            error = EngineError(
                f"the request could not be started; see the server's log under {request.id}"
            )
            self._failed[request.id] = (request, error)
            return Admission.FAILED
        return Admission.ADMITTED

    def _is_restoring(self, request: Request) -> bool:
        """Return True while pages of the request come from files. The first call starts that."""
        if request.source.reads_all_rows or not self._kv.has_files:
            return False
        return self._kv.is_restoring(
            request.id, _root_of(request), request.key_ids, self._turn_of(request)
        )

    def _turn_of(self, request: Request) -> KeyTurn | None:
        if request.adapter_from == 0:
            return None
        page = request.adapter_from // self._kv.page_size
        return KeyTurn(page, f"{request.adapter_digest}:{request.adapter_from}".encode())

    def _start(self, request: Request, n_cached: int) -> None:
        """Moves a request with pages to the running ones and holds its adapter."""
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
        """Starts to load the request's adapter if it is absent. ADMITTED means resident."""
        adapter = request.source.adapter
        if adapter is None:
            return Admission.ADMITTED
        if request.id in self._failed:
            return Admission.FAILED
        try:
            return _ADMISSIONS[self._adapters.ensure_resident(adapter.plan, spared=spared)]
        except EngineError as error:
            self._failed[request.id] = (request, error)
            return Admission.FAILED


def _root_of(request: Request) -> bytes:
    # Pages before an activated adapter begins are the base's, and so are their keys.
    return prefix_root(request.digest_at(0), request.source.cache_salt)


def _is_computed(request: Request) -> bool:
    return request.is_full or request.n_computed == request.n_tokens


def _is_prefilling(request: Request) -> bool:
    return request.n_tokens - request.n_computed > 1


_ADMISSIONS = {
    Residency.RESIDENT: Admission.ADMITTED,
    Residency.LOADING: Admission.LOADING,
    Residency.FULL: Admission.NO_ADAPTER_SLOT,
}
