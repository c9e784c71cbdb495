"""Adapters that learn from examples: a draft at once, and a job that makes it better.

order ──► job ──► draft, served under its name ──► trained on the examples, beside serving
                                                       │ gained: the name points at the result
                                                       └ else: the draft stays, and its card says so

A description that the generator refuses has no draft: its name is there when the job has ended and
something was learnt. Orders of one tenant that are equal share a job. A job that is cancelled, or
that the server's end cuts off, leaves the draft; an equal order starts another one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import RevisionConflict, UnknownAdapter
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import OutOfDistribution
from loraplex_generation.refinement import Progress, RefinementProgress
from loraplex_generation.service import GeneratedAdapter
from loraplex_server.api.errors import ApiError, from_store, invalid, too_many
from loraplex_server.api_keys import AdapterAccess

from .generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from .jobs import Job, JobCancelled, Jobs

__all__ = ["DEFAULT_BUDGET_S", "Learner", "Learning", "Learnt", "Ordered", "Trainer"]

DEFAULT_BUDGET_S = 30.0
_PUT_S = 0.5  # of a budget, kept for checking and storing what was learnt
_MAX_OF_TENANT = 4  # jobs that run or wait; one runs at a time
_MAX_JOBS = 32
_T = TypeVar("_T")


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

    card: AdapterCard  # what answers now
    job: str | None  # that may still replace it by something better


class Learner(Protocol):
    async def learn(
        self, request: AdapterGenerationRequest, access: AdapterAccess, *, wait: bool
    ) -> Learnt:
        """The draft, or with ``wait`` what is learnt. Raises StoreError or ApiError."""


@dataclass(slots=True)
class _Running:
    job: Job
    drafted: asyncio.Future[AdapterCard | None]
    refusal: OutOfDistribution | None = None  # why there is no draft


@dataclass(slots=True)
class _Order:
    request: AdapterGenerationRequest
    access: AdapterAccess
    name: str | None  # of the caller's, as the store knows it
    ttl_s: float | None
    budget_s: float
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def tenant(self) -> str:
        return self.access.tenant or ""


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
        self._stops: set[threading.Event] = set()
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
        if name is None and (done := await self._learnt_before(stored, order)) is not None:
            return Ordered(done, None)
        running = self._running.get((stored, request.key)) or self._start(stored, order)
        await asyncio.wait([running.drafted])
        return Ordered(running.drafted.result(), running.job, running.refusal)

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
        self, request: AdapterGenerationRequest, access: AdapterAccess, *, wait: bool
    ) -> Learnt:
        """See ``Learner``."""
        ordered = await self.order(request, access)
        card, job = ordered.card, ordered.job
        if job is not None and wait:
            card = await self.wait(job)
        if card is None:
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
        """A job that the server's end cut off, known by the draft that it left. Blocks."""
        for card in access.listed(self._store.list()):
            refinement = card.provenance.get("refinement")
            if not isinstance(refinement, dict) or refinement.get("job") != job_id:
                continue
            if access.tenant is not None and not access.owns(card.name):
                return None
            told = "the server went down while it learnt; the draft stays, order it again"
            error = ApiError(503, told, code="server_restarted")
            return Job.lost(job_id, card, access, error)
        return None

    def close(self) -> None:
        """Training stops within a step."""
        for stop in self._stops:
            stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _budget(self, wanted_s: float | None) -> float:
        if wanted_s is None:
            return min(DEFAULT_BUDGET_S, self._max_budget_s)
        if wanted_s > self._max_budget_s:
            raise invalid(
                f"budget_s is {wanted_s:g}, this server learns for at most {self._max_budget_s:g} "
                "seconds (--max-learning-time)",
                "budget_s",
            )
        return wanted_s

    async def _learnt_before(self, stored: str, order: _Order) -> AdapterCard | None:
        """The unnamed adapter of an equal order that has ended; its life starts anew."""

        def find() -> AdapterCard | None:
            try:
                if not _has_learnt(self._store.get(stored)):
                    return None
            except UnknownAdapter:
                return None
            card = self._generated.ensure(
                order.request, tenant=order.tenant, quota=order.access.quota
            )
            return card if _has_learnt(card) else None  # else it went, and this is a new draft

        return await self._blocking(find)

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
            self._stops.add(order.stop)
            try:
                return await self._work(job, order, running)
            except BaseException as error:
                if not drafted.done() and isinstance(error, Exception):
                    drafted.set_exception(error)
                drafted.cancel()  # else: the loop ends
                raise
            finally:
                self._stops.discard(order.stop)
                del self._running[key]

        job = self._jobs.start_task(stored, order.access, work, param="description")
        running = self._running[key] = _Running(job, drafted)
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
        job.learning["serves"] = None if draft is None else "draft"
        running.drafted.set_result(draft)
        job.tell("queued", 0.0)
        made = await self._trained(job, order)
        refinement = made.card["refinement"]
        assert isinstance(refinement, dict)
        job.tell("storing", 1.0)
        put = partial(
            self._generated.replace_draft,
            job.adapter,
            None if draft is None else draft.digest,
            made,
            order.request,
            ttl_s=order.ttl_s,
            quota=order.access.quota,
        )
        try:
            card = await self._blocking(put)
        except (RevisionConflict, UnknownAdapter) as error:
            job.card = None
            job.learning["serves"] = None
            raise ApiError(
                409,
                f"adapter {order.access.shown(job.adapter)!r} was replaced or removed while its "
                "examples were learnt; what was learnt is dropped",
                code="adapter_changed",
                param="name",
            ) from error
        job.learning |= {
            "serves": "learnt" if refinement["gained"] else "draft",
            "gained": refinement["gained"],
        }
        return card

    async def _draft(self, job: Job, order: _Order, running: _Running) -> AdapterCard | None:
        """None where the description is refused: the examples have to say what is meant.

        The draft that an equal order left is taken as it is, under a name of the caller's, too.
        """
        left = await self._blocking(partial(self._left_draft, job.adapter, order))
        if left is not None:
            return left
        unfinished: JsonValue = {
            "finished": False,
            "job": job.id,
            "order": order.request.key,
        }
        make = partial(
            self._generated.ensure,
            order.request,
            tenant=order.tenant,
            name=order.name,
            ttl_s=order.ttl_s,
            quota=order.access.quota,
            told={"examples": len(order.request.examples), "refinement": unfinished},
        )
        try:
            return await self._blocking(make)
        except OutOfDistribution as refusal:
            running.refusal = refusal
            return None

    def _left_draft(self, stored: str, order: _Order) -> AdapterCard | None:
        if order.name is None:
            return None  # its life starts anew, see ``GeneratedAdapters.ensure``
        try:
            card = self._store.get(stored)
        except UnknownAdapter:
            return None
        left = card.provenance.get("refinement")
        if not isinstance(left, dict) or left.get("finished") is not False:
            return None
        return card if left.get("order") == order.request.key else None

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


def _has_learnt(card: AdapterCard) -> bool:
    """Whether a job has ended for it, whatever was gained."""
    refinement = card.provenance.get("refinement")
    return isinstance(refinement, dict) and refinement.get("finished") is True


def _tell(job: Job, now: RefinementProgress) -> None:
    if job.learning is not None:
        nll = None if now.held_out_nll is None else round(now.held_out_nll, 4)
        job.learning |= {"step": now.step, "n_steps": now.n_steps, "held_out_nll": nll}
    job.tell(now.stage, now.step / now.n_steps)
