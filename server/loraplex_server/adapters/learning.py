"""Adapters that learn from examples: a draft at once, and a job that makes it better.

order ──► job ──► draft, served under its name ──► trained on the examples, beside serving
                                                       │ gained: the name points at the result
                                                       └ else: the draft stays, and its card says so

A description that the generator refuses has no draft: its name is there when the job has ended and
something was learnt. Orders of one tenant that are equal share a job. A job that is cancelled, or
that the server's end cuts off, leaves the draft; an equal order starts another one. So does one
with more time than had a job that time cut off: what that has learnt serves meanwhile, and stays
unless something better comes (``learning_record``).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import RevisionConflict, StoreError, UnknownAdapter
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import NothingLearnt, OutOfDistribution, OutOfTime
from loraplex_generation.refinement import Progress, RefinementProgress
from loraplex_generation.service import GeneratedAdapter
from loraplex_server.api.errors import ApiError, from_store, invalid, too_many
from loraplex_server.api_keys import AdapterAccess

from .generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from .jobs import Job, JobCancelled, Jobs
from .learning_record import (
    begun,
    draft_record,
    ended,
    how_ended,
    is_better,
    is_result,
    last_budget_s,
    may_learn_again,
    record_of,
    serves,
    settled,
    why_lost,
)

__all__ = ["DEFAULT_BUDGET_S", "Learner", "Learning", "Learnt", "Ordered", "Trainer"]

DEFAULT_BUDGET_S = 30.0
_PUT_S = 0.5  # of a budget, kept for checking and storing what was learnt
_SLACK_S = 60.0  # for all of a job that no budget bounds: loading what generates, say
_MAX_OF_TENANT = 4  # jobs that run or wait; one runs at a time
_MAX_JOBS = 32
_MAX_IN_VAIN = 1024  # orders that are remembered
_PAUSE_S = 300.0  # before a chat starts a job again that failed
_NOTHING = ("nothing_learnt", "out_of_time")  # codes of jobs that failed as they may
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Trainer(Protocol):
    def check(self, request: AdapterGenerationRequest) -> None:
        """Raises UnfitExamples for what cannot be learnt from. Any thread, some milliseconds."""

    def train(
        self,
        request: AdapterGenerationRequest,
        *,
        deadline: float,
        stop: threading.Event,
        report: Progress,
    ) -> GeneratedAdapter:
        """Blocks, at most until ``deadline`` (of ``time.monotonic``) or until ``report`` raises.

        ``stop`` is set when ``report`` is going to raise: what waits then stops waiting.
        The card's ``refinement`` says whether anything was gained; if not, it is the draft.
        """


class Ordered(NamedTuple):
    card: AdapterCard | None  # what answers now; None: nothing before the job's end
    job: Job | None  # None: it was learnt before
    refusal: OutOfDistribution | None = None  # why there is no draft


class Learnt(NamedTuple):
    """For a request that brings its examples. Crosses processes."""

    card: AdapterCard | None  # what answers now; None: nothing yet, only where that was allowed
    job: str | None  # that may still replace it by something better


class Learner(Protocol):
    async def learn(
        self,
        request: AdapterGenerationRequest,
        access: AdapterAccess,
        *,
        wait: bool,
        needs_adapter: bool,
    ) -> Learnt:
        """The draft, or with ``wait`` what is learnt. Raises StoreError or ApiError.

        ``needs_adapter``: raise, too, where there is none, and not before all was tried again. Who
        does not need one has another answer, so no job starts that would learn nothing.
        """


@dataclass(slots=True)
class _Order:
    request: AdapterGenerationRequest
    access: AdapterAccess
    name: str | None  # of the caller's, as the store knows it
    ttl_s: float | None
    budget_s: float
    left: AdapterCard | None = None  # by an equal order: its job goes on from that
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def tenant(self) -> str:
        return self.access.tenant or ""


class _InVain(NamedTuple):
    """An order whose last job has failed."""

    spent_s: float | None  # the time that was not enough; None: time was not what it wanted
    until: float  # of ``time.monotonic``: until then chats start no other


@dataclass(slots=True)
class _Running:
    job: Job
    order: _Order
    drafted: asyncio.Future[AdapterCard | None]
    refusal: OutOfDistribution | None = None  # why there is no draft


class Learning:
    """Owner of the jobs that learn, and of the one thread that trains. Event loop only."""

    def __init__(
        self,
        store: AdapterStore,
        generated: GeneratedAdapters,
        jobs: Jobs,
        trainer: Trainer,
        executor: Executor,
        *,
        max_budget_s: float = 600.0,
    ) -> None:
        """``executor`` runs what blocks for tens of milliseconds."""
        self._store, self._generated, self._jobs = store, generated, jobs
        self._trainer, self._executor = trainer, executor
        self._max_budget_s = max_budget_s
        self._running: dict[tuple[str, str], _Running] = {}
        self._in_vain: dict[tuple[str, str], _InVain] = {}
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-training")

    async def order(
        self,
        request: AdapterGenerationRequest,
        access: AdapterAccess,
        *,
        name: str | None = None,
        ttl_s: float | None = None,
        budget_s: float | None = None,
    ) -> Ordered:
        """Returns when the draft answers, or is known not to come.

        ``name`` and ``ttl_s`` as for ``GeneratedAdapters.ensure``. Raises what that raises, and
        ApiError (400, 429).
        """
        order = _Order(request, access, name, ttl_s, self._budget(budget_s))
        await self._blocking(partial(self._trainer.check, request))
        stored = name or self._generated.unnamed(request, order.tenant)
        await self._end_lost(stored, request.key)
        running = self._running.get((stored, request.key))
        found = running or await self._left_or_started(stored, order, budget_s)
        if isinstance(found, AdapterCard):
            return Ordered(found, None)
        await asyncio.wait([found.drafted])
        return Ordered(found.drafted.result(), found.job, found.refusal)

    async def wait(self, job: Job) -> AdapterCard:
        """The job's adapter. Raises ApiError where it failed or was cancelled."""
        await self._jobs.wait(job, None)
        if job.error is not None:
            raise job.error
        if job.card is None:
            raise ApiError(
                409, f"job {job.id} was cancelled before there was an adapter", code="job_cancelled"
            )
        return job.card

    async def learn(
        self,
        request: AdapterGenerationRequest,
        access: AdapterAccess,
        *,
        wait: bool,
        needs_adapter: bool,
    ) -> Learnt:
        """See ``Learner``. Who waits does so for something learnt, not for something better."""
        # In a thread, since it hashes the examples, megabytes perhaps; the key is kept.
        unnamed = partial(self._generated.unnamed, request, access.tenant or "")
        stored = await self._blocking(unnamed)
        if not needs_adapter and self._is_vain(stored, request.key):
            return Learnt(await self._blocking(partial(self._generated.servable, stored)), None)
        ordered = await self.order(request, access)
        card, job = ordered.card, ordered.job
        if job is not None and wait and serves(card) != "learnt":
            try:
                card = await self.wait(job)
            except ApiError as error:
                if needs_adapter or error.code not in _NOTHING:
                    raise
                card, job = job.card, None
        if card is None and needs_adapter:
            raise self._refusal(ordered)
        return Learnt(card, None if job is None else job.id)

    def _refusal(self, ordered: Ordered) -> ApiError:
        """For who asks for an answer when ``ordered`` has no draft."""
        job, refusal = ordered.job, ordered.refusal
        assert job is not None
        assert refusal is not None
        told = from_store(refusal, access=job.access)
        told.message = (
            f"there is no draft to answer with: {refusal}. The examples are being "
            f"learnt: wait for /v1/jobs/{job.id} and send the request again, or send "
            '"wait": true in the adapter'
        )
        told.details["job"] = job.id
        return told

    def lost(self, job_id: str, access: AdapterAccess) -> Job | None:
        """A job that is not remembered, known by the adapter that it left. Blocks."""
        for card in access.listed(self._store.list()):
            record = record_of(card)
            if record.get("job") != job_id:
                continue
            if access.tenant is not None and not access.owns(card.name):
                return None
            return Job.lost(job_id, card, access, why_lost(record))
        return None

    def close(self) -> None:
        """Training stops within a step."""
        self._closed = True
        for running in self._running.values():
            running.order.stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _budget(self, wanted_s: float | None, spent_s: float | None = None) -> float:
        """``spent_s``: what was not enough the last time."""
        if wanted_s is None:
            enough_s = DEFAULT_BUDGET_S if spent_s is None else max(DEFAULT_BUDGET_S, 2 * spent_s)
            return min(enough_s, self._max_budget_s)
        if wanted_s > self._max_budget_s:
            raise invalid(
                f"budget_s is {wanted_s:g}, this server learns for at most {self._max_budget_s:g} "
                "seconds (--max-learning-time)",
                "budget_s",
            )
        return wanted_s

    async def _end_lost(self, stored: str, key: str) -> None:
        """Waits for the end of a job that was cancelled, or whose adapter is not there any more."""
        while running := self._running.get((stored, key)):
            if not (running.order.stop.is_set() or await self._has_changed(running)):
                return
            self._jobs.cancel(running.job)
            assert running.job.task is not None
            await asyncio.wait([running.job.task])

    async def _has_changed(self, running: _Running) -> bool:
        """Whether somebody replaced or removed what the job's result would replace."""
        if not running.drafted.done():
            return False
        draft = running.drafted.result()
        now = await self._blocking(partial(self._generated.servable, running.job.adapter))
        return (now and now.digest) != (draft and draft.digest)

    async def _left_or_started(
        self, stored: str, order: _Order, wanted_s: float | None
    ) -> AdapterCard | _Running:
        """What an equal order has learnt, or a job that learns, from what that left if it left any.

        Raises ApiError (429).
        """
        left = await self._blocking(partial(self._left, stored, order))
        record = record_of(left)
        if left is None and (vain := self._in_vain.get((stored, order.request.key))) is not None:
            order.budget_s = self._budget(wanted_s, vain.spent_s)
        if left is not None:
            order.budget_s = self._budget(wanted_s, last_budget_s(record))
            if may_learn_again(record, order.budget_s):
                order.left = left
            elif order.name is None and (card := await self._renewed(left, order)) is not None:
                return card
        try:
            return self._running.get((stored, order.request.key)) or self._start(stored, order)
        except ApiError:
            # Who asks neither for more time nor for a name is answered by what there is.
            if left is None or not is_result(record) or wanted_s is not None or order.name:
                raise
            if (card := await self._renewed(left, order)) is None:
                raise
            return card

    def _left(self, stored: str, order: _Order) -> AdapterCard | None:
        """The draft or the result of an equal order, for this base."""
        card = self._generated.servable(stored)
        is_ours = order.name is None or record_of(card).get("order") == order.request.key
        return card if is_ours else None

    async def _renewed(self, card: AdapterCard, order: _Order) -> AdapterCard | None:
        return await self._blocking(partial(self._generated.renewed, card, order.ttl_s))

    def _start(self, stored: str, order: _Order) -> _Running:
        """Raises ApiError (429)."""
        jobs = [running.job for running in self._running.values()]
        n_ours = sum(job.access.tenant == order.access.tenant for job in jobs)
        if n_ours >= _MAX_OF_TENANT or len(jobs) >= _MAX_JOBS:
            busy = f"{n_ours} jobs of this tenant" if n_ours >= _MAX_OF_TENANT else "too many jobs"
            raise too_many(
                f"{busy} are learning from examples or wait for it; wait for one to end",
                "too_many_learning_jobs",
                order.budget_s,
            )
        drafted: asyncio.Future[AdapterCard | None] = asyncio.get_running_loop().create_future()
        drafted.add_done_callback(lambda done: done.cancelled() or done.exception())
        key = (stored, order.request.key)

        async def work(job: Job) -> AdapterCard:
            try:
                return await self._work(job, order, running)
            except BaseException as error:
                if not drafted.done() and isinstance(error, Exception):
                    drafted.set_exception(error)
                drafted.cancel()  # else: the loop ends
                raise
            finally:
                del self._running[key]

        job = self._jobs.start_task(stored, order.access, work, param="description")
        running = self._running[key] = _Running(job, order, drafted)
        return running

    async def _work(self, job: Job, order: _Order, running: _Running) -> AdapterCard:
        job.cancel = order.stop.set
        job.learning = {
            "step": 0,
            "n_steps": 0,
            "held_out_nll": None,
            "serves": None,
            "gained": None,
        }
        job.tell("draft", 0.0)
        draft = await self._draft(job, order, running)
        job.card = draft
        job.learning["serves"] = serves(draft)
        running.drafted.set_result(draft)
        job.tell("queued", 0.0)
        try:
            made = await self._trained(job, order)
            job.tell("storing", 1.0)
            return await self._stored(job, order, draft, made)
        except Exception as error:
            if draft is not None and not self._closed:
                await self._leave(job, order, draft, error)
            self._remember(job.adapter, order, error)
            raise

    async def _draft(self, job: Job, order: _Order, running: _Running) -> AdapterCard | None:
        """What answers while the job runs; None where the description is refused.

        That is what an equal order left, or a new draft. It does not expire before the job ends.
        """
        busy_s = _SLACK_S + sum(each.order.budget_s for each in self._running.values())
        if order.left is not None:
            record = begun(record_of(order.left), job.id)
            note = partial(
                self._generated.note, order.left, record, ttl_s=order.ttl_s, busy_s=busy_s
            )
            with suppress(RevisionConflict, UnknownAdapter):  # it went meanwhile
                return await self._blocking(note)
        make = partial(
            self._generated.ensure,
            order.request,
            tenant=order.tenant,
            name=order.name,
            ttl_s=order.ttl_s,
            quota=order.access.quota,
            told={
                "examples": len(order.request.examples),
                "refinement": dict(draft_record(job.id, order.request.key)),
            },
            busy_s=busy_s,
        )
        try:
            return await self._blocking(make)
        except OutOfDistribution as refusal:
            running.refusal = refusal
            return None

    async def _stored(
        self, job: Job, order: _Order, draft: AdapterCard | None, made: GeneratedAdapter
    ) -> AdapterCard:
        """What answers from now on: ``made``, or what did before where that is better founded."""
        assert job.learning is not None
        refinement = made.card["refinement"]
        assert isinstance(refinement, dict)
        record = {**refinement, "order": order.request.key, "budget_s": order.budget_s}
        if draft is None or is_better(record, record_of(draft)):
            put = partial(
                self._generated.replace_draft,
                job.adapter,
                None if draft is None else draft.digest,
                replace(made, card={**made.card, "refinement": record}),
                order.request,
                ttl_s=order.ttl_s,
                quota=order.access.quota,
            )
            gained = record["gained"]
        else:
            as_before = settled(record_of(draft), order.budget_s)
            put = partial(self._generated.note, draft, as_before, ttl_s=order.ttl_s)
            gained = False
        try:
            card = await self._blocking(put)
        except (RevisionConflict, UnknownAdapter) as error:
            raise _changed(job, order) from error
        self._in_vain.pop((job.adapter, order.request.key), None)
        job.learning |= {"serves": serves(card), "gained": gained}
        return card

    async def _leave(self, job: Job, order: _Order, draft: AdapterCard, error: Exception) -> None:
        """``draft`` goes on answering, and says how its job has ended."""
        short_s = order.budget_s if isinstance(error, OutOfTime) else None
        record = ended(record_of(draft), how_ended(error), short_s)
        note = partial(self._generated.note, draft, record, ttl_s=order.ttl_s)
        try:
            job.card = await self._blocking(note)
        except (RevisionConflict, UnknownAdapter):
            changed = _changed(job, order)
            if isinstance(error, JobCancelled):
                raise changed from error
        except StoreError:
            _log.warning("the end of %s could not be noted", job.id, exc_info=True)

    def _is_vain(self, stored: str, key: str) -> bool:
        """Whether a job for such an order would learn nothing, by what came of the last one."""
        vain = self._in_vain.get((stored, key))
        return vain is not None and time.monotonic() < vain.until

    def _remember(self, stored: str, order: _Order, error: Exception) -> None:
        """What came of a job, for chats: not every one starts it again."""
        if isinstance(error, JobCancelled) or how_ended(error) == "adapter_changed":
            return
        key = stored, order.request.key
        spent_s, until = None, time.monotonic() + _PAUSE_S
        if isinstance(error, OutOfTime) or (isinstance(error, NothingLearnt) and error.timed_out):
            last = self._in_vain.get(key)
            spent_s = max(order.budget_s, (last and last.spent_s) or 0.0)
            until = math.inf if spent_s >= self._max_budget_s else 0.0
        elif isinstance(error, NothingLearnt):
            until = math.inf
        self._in_vain.pop(key, None)
        while len(self._in_vain) >= _MAX_IN_VAIN:
            del self._in_vain[next(iter(self._in_vain))]
        self._in_vain[key] = _InVain(spent_s, until)

    async def _trained(self, job: Job, order: _Order) -> GeneratedAdapter:
        """Raises JobCancelled, at once where it has not begun, else within a step."""
        if order.stop.is_set():
            raise JobCancelled
        loop = asyncio.get_running_loop()

        def report(now: RefinementProgress) -> None:
            if order.stop.is_set():
                raise JobCancelled
            loop.call_soon_threadsafe(_tell, job, now)

        def train() -> GeneratedAdapter:
            deadline = time.monotonic() + order.budget_s - _PUT_S
            return self._trainer.train(
                order.request, deadline=deadline, stop=order.stop, report=report
            )

        future: Future[GeneratedAdapter] = self._thread.submit(train)

        def cancel() -> None:
            order.stop.set()
            future.cancel()  # if it waits still

        job.cancel = cancel
        try:
            made = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if order.stop.is_set() and future.cancelled():
                raise JobCancelled from None
            order.stop.set()  # the loop ends
            raise
        if order.stop.is_set():
            raise JobCancelled
        return made

    async def _blocking(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _changed(job: Job, order: _Order) -> ApiError:
    """For a job whose adapter went under it; what is shown of the job says that nothing is left."""
    job.card = None
    if job.learning is not None:
        job.learning["serves"] = None
    return ApiError(
        409,
        f"adapter {order.access.shown(job.adapter)!r} was replaced or removed while its "
        "examples were learnt; what was learnt is dropped",
        code="adapter_changed",
        param="name",
    )


def _tell(job: Job, now: RefinementProgress) -> None:
    if job.learning is not None:
        nll = None if now.held_out_nll is None else round(now.held_out_nll, 4)
        job.learning |= {"step": now.step, "n_steps": now.n_steps, "held_out_nll": nll}
    job.tell(now.stage, now.step / now.n_steps)
