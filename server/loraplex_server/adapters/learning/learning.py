"""Adapters that learn from examples: an initial adapter at once, and a job that improves it.

request ──► job ──► initial adapter, generated from the description, served under its name
                     └► trained on the examples, beside serving
                          ├ better than the base: the name points at the result
                          └ otherwise: the job fails, and the initial adapter stays

A base without a generator has no initial adapter: the name exists once the job has learnt
something. Equal requests of one tenant share a job. A job that fails or is cancelled leaves
the initial adapter, and an equal request starts another job from it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

from loraplex_adapter_store.errors import RevisionConflict, StoreError, UnknownAdapter
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_generation.errors import (
    BudgetTooShort,
    GeneratorMismatch,
    NothingLearnt,
    NotTrained,
    OutOfDistribution,
)
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.errors import ApiError, from_store, invalid, too_many, unavailable
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantShares, TenantThreads

from .example_learner import ExampleLearner, LearningProgress, Learnt, Pairs
from .generated_adapters import GeneratedAdapters
from .jobs import Job, JobCancelled, Jobs, take_turn
from .learning_record import Record, is_final, record_of, serves, without_job

DEFAULT_BUDGET_S = 30.0
_STORE_S = 0.5  # part of the budget, reserved for checking and storing the result
_SLACK_S = 60.0  # for the parts of a job that no budget bounds, such as loading the generator
_RENEW_S = 20.0  # until the expiry of the initial adapter is checked again
_MAX_JOBS = 4  # of a tenant, running or waiting; one job trains at a time
_MAX_FAILED = 1024  # failed attempts that are remembered
_PAUSE_S = 600.0  # after a failed attempt, until a chat starts another job
_NOTHING_LEARNT = ("nothing_learnt", "out_of_time")  # codes of jobs that failed for the examples
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Submitted(NamedTuple):
    card: AdapterCard | None  # the adapter that answers now; None until the job ends
    job: Job | None  # None: nothing is left to learn
    refusal: StoreError | None = None  # why there is no initial adapter


class LearningRequest(NamedTuple):
    """A chat's request for an adapter that learns from examples. Crosses processes."""

    generation: AdapterGenerationRequest
    access: AdapterAccess
    wait: bool  # for the learnt adapter
    needs_adapter: bool  # False: the caller has another answer


class LearningResult(NamedTuple):
    """The answer to a ``LearningRequest``. Crosses processes."""

    card: AdapterCard | None  # the adapter that answers now, if any
    job: str | None  # id of a job that may still improve the adapter


Learner = Callable[[LearningRequest], Awaitable[LearningResult]]
"""``Learning.learn``, of this process or of another one."""


@dataclass(slots=True)
class _Attempt:
    """A job that learns from examples, with its inputs."""

    request: AdapterGenerationRequest
    pairs: Pairs
    access: AdapterAccess
    name: str | None  # chosen by the caller, as the store knows it
    ttl_s: float | None
    budget_s: float
    existing: AdapterCard | None  # left by an equal request; this job improves it
    initial: asyncio.Future[AdapterCard | None]  # set when the initial adapter answers
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    job: Job = field(init=False)
    refusal: StoreError | None = None  # why there is no initial adapter


class Learning:
    """Owner of the jobs that learn, one at a time, with a turn for each tenant. Event loop only."""

    def __init__(
        self,
        generated: GeneratedAdapters,
        jobs: Jobs,
        learner: ExampleLearner,
        changes: TenantThreads,
        *,
        max_budget_s: float = 600.0,
    ) -> None:
        """``changes`` run calls that block for tens of milliseconds."""
        self._generated, self._jobs = generated, jobs
        self._learner, self._changes = learner, changes
        self._max_budget_s = max_budget_s
        self._attempts: dict[tuple[str, str], _Attempt] = {}  # by stored name and request key
        self._failed: dict[tuple[str, str], float] = {}  # time of the failure
        self._turns = TenantShares("jobs that learn", 1, 1)

    async def submit(
        self,
        request: AdapterGenerationRequest,
        access: AdapterAccess,
        *,
        name: str | None = None,
        ttl_s: float | None = None,
        budget_s: float | None = None,
    ) -> Submitted:
        """Join or start the job of a request. Return once its initial adapter answers.

        ``name`` and ``ttl_s`` are those of ``GeneratedAdapters.ensure``. Raises StoreError, and
        ApiError (400, 429).
        """
        self._check_budget(budget_s)
        pairs = await self._blocking(access, partial(self._learner.prepare, request))
        stored = name or self._generated.unnamed(request, access.tenant or "")
        key = stored, request.key
        while (attempt := self._attempts.get(key)) and attempt.stop.is_set():
            assert attempt.job.task is not None
            await asyncio.wait([attempt.job.task])
        if attempt is None:
            existing = await self._blocking(access, partial(self._generated.servable, stored))
            record = record_of(existing)
            if name is not None and record.get("order") != request.key:
                existing = None  # learnt from another request
            if existing is not None and is_final(record, budget_s):
                if name is None:
                    ensure = partial(
                        self._generated.ensure, request, tenant=access.tenant or "", ttl_s=ttl_s
                    )
                    return Submitted(await self._blocking(access, ensure), None)
                existing = None  # the name is taken
            attempt = self._attempts.get(key)
            if attempt is None:
                budget_s = budget_s or min(DEFAULT_BUDGET_S, self._max_budget_s)
                self._learner.check_budget(pairs, budget_s - _STORE_S)
                initial = asyncio.get_running_loop().create_future()
                attempt = _Attempt(request, pairs, access, name, ttl_s, budget_s, existing, initial)
                self._start(stored, attempt)
        await asyncio.wait([attempt.initial])
        return Submitted(attempt.initial.result(), attempt.job, attempt.refusal)

    async def wait(self, job: Job) -> AdapterCard:
        """Return the job's adapter. Raises ApiError if the job failed or was cancelled."""
        await self._jobs.wait(job, None)
        if job.error is not None:
            raise job.error
        if job.card is None:
            raise ApiError(
                409, f"job {job.id} was cancelled before there was an adapter", code="job_cancelled"
            )
        return job.card

    async def learn(self, order: LearningRequest) -> LearningResult:
        """Return the current adapter, or with ``wait`` the learnt one. Raises StoreError, ApiError.

        With ``needs_adapter``, a request without an adapter raises. Otherwise no job starts for a
        request whose last job failed a short time ago.
        """
        request, access, wait, needs_adapter = order
        # This runs in a thread, since hashing the examples takes milliseconds. The key is cached.
        unnamed = partial(self._generated.unnamed, request, access.tenant or "")
        stored = await self._blocking(access, unnamed)
        failed = self._failed.get((stored, request.key))
        if not needs_adapter and failed is not None and time.monotonic() < failed + _PAUSE_S:
            card = await self._blocking(access, partial(self._generated.servable, stored))
            return LearningResult(card, None)
        try:
            submitted = await self.submit(request, access)
        except BudgetTooShort:  # turns answer
            if needs_adapter:
                raise
            return LearningResult(None, None)
        card, job = submitted.card, submitted.job
        if job is not None and wait and serves(card) != "learnt":
            try:
                card = await self.wait(job)
            except ApiError as error:
                if needs_adapter or error.code not in _NOTHING_LEARNT:
                    raise
                card, job = job.card, None
        if card is None and needs_adapter:
            raise _no_adapter_yet(submitted)
        return LearningResult(card, None if job is None else job.id)

    def close(self) -> None:
        """Stop training within a step."""
        for attempt in self._attempts.values():
            attempt.stop.set()

    def _check_budget(self, budget_s: float | None) -> None:
        """Raises ApiError (400)."""
        if budget_s is not None and budget_s > self._max_budget_s:
            raise invalid(
                f"budget_s is {budget_s:g}, this server learns for at most {self._max_budget_s:g} "
                "seconds (--max-learning-time)",
                "budget_s",
            )

    def _start(self, stored: str, attempt: _Attempt) -> _Attempt:
        """Start the job of an attempt. Raises ApiError (429)."""
        tenant = attempt.access.tenant
        n_ours = sum(each.access.tenant == tenant for each in self._attempts.values())
        if n_ours >= _MAX_JOBS:
            raise too_many(
                f"{n_ours} jobs of this tenant are learning from examples or wait for it; wait "
                "for one to end",
                "too_many_learning_jobs",
                attempt.budget_s,
            )
        initial = attempt.initial
        initial.add_done_callback(lambda done: done.cancelled() or done.exception())
        key = stored, attempt.request.key

        async def work(job: Job) -> AdapterCard:
            try:
                card = await self._work(job, attempt)
            except BaseException as error:
                if not initial.done() and isinstance(error, Exception):
                    initial.set_exception(error)
                initial.cancel()  # the loop ends
                if not isinstance(error, JobCancelled):
                    self._remember_failure(key)
                raise
            finally:
                del self._attempts[key]
            self._failed.pop(key, None)
            return card

        attempt.job = self._jobs.start_task(stored, attempt.access, work, param="description")
        self._attempts[key] = attempt
        return attempt

    def _remember_failure(self, key: tuple[str, str]) -> None:
        self._failed.pop(key, None)
        while len(self._failed) >= _MAX_FAILED:
            del self._failed[next(iter(self._failed))]
        self._failed[key] = time.monotonic()

    async def _work(self, job: Job, attempt: _Attempt) -> AdapterCard:
        job.cancel = attempt.stop.set
        job.learning = {
            "step": 0,
            "held_out_nll": None,
            "serves": None,
            "gained": None,
        }
        job.tell("draft", 0.0)
        job.card = initial = await self._initial_adapter(job, attempt)
        job.learning["serves"] = serves(initial)
        attempt.initial.set_result(initial)
        job.tell("queued", 0.0)
        async with self._unexpired(job.adapter, attempt.access):
            learnt = await self._train(job, attempt)
        job.tell("storing", 1.0)
        return await self._store_result(job, attempt, initial, learnt)

    async def _initial_adapter(self, job: Job, attempt: _Attempt) -> AdapterCard | None:
        """Return the adapter that answers while the job runs; None if there is none.

        The adapter does not expire before the job ends.
        """
        busy_s = _SLACK_S + sum(each.budget_s for each in self._attempts.values())
        if attempt.existing is not None:
            record = {**record_of(attempt.existing), "job": job.id}
            note = partial(
                self._generated.note, attempt.existing, record, ttl_s=attempt.ttl_s, busy_s=busy_s
            )
            with suppress(RevisionConflict, UnknownAdapter):  # replaced or removed meanwhile
                return await self._blocking(attempt.access, note)
        request = attempt.request
        ensure = partial(
            self._generated.ensure,
            request,
            tenant=attempt.access.tenant or "",
            name=attempt.name,
            ttl_s=attempt.ttl_s,
            quota=attempt.access.quota,
            provenance={
                "examples": len(request.examples),
                "refinement": {"finished": False, "job": job.id, "order": request.key},
            },
            busy_s=busy_s,
        )
        try:
            return await self._blocking(attempt.access, ensure)
        except (OutOfDistribution, GeneratorMismatch, NotTrained) as refusal:
            attempt.refusal = refusal
            return None

    async def _store_result(
        self, job: Job, attempt: _Attempt, initial: AdapterCard | None, learnt: Learnt
    ) -> AdapterCard:
        """Store what was learnt; without a gain, note on the initial adapter that there was none.

        Raises NothingLearnt if there is neither.
        """
        assert job.learning is not None
        spent: Record = {"order": attempt.request.key, "budget_s": attempt.budget_s}
        record = {**learnt.refinement, **spent}
        if learnt.adapter is None:
            if initial is None:
                raise NothingLearnt(len(attempt.request.examples))
            if serves(initial) == "learnt":
                record = {**without_job(record_of(initial)), **spent}
            put = partial(self._generated.note, initial, record, ttl_s=attempt.ttl_s)
        else:
            put = partial(
                self._generated.replace,
                job.adapter,
                None if initial is None else initial.digest,
                replace(learnt.adapter, card={**learnt.adapter.card, "refinement": record}),
                attempt.request,
                ttl_s=attempt.ttl_s,
                quota=attempt.access.quota,
            )
        try:
            card = await self._blocking(attempt.access, put)
        except (RevisionConflict, UnknownAdapter) as error:
            job.card, job.learning["serves"] = None, None
            raise ApiError(
                409,
                f"adapter {attempt.access.shown(job.adapter)!r} was replaced or removed while its "
                "examples were learnt; what was learnt is dropped",
                code="adapter_changed",
                param="name",
            ) from error
        job.learning |= {"serves": serves(card), "gained": learnt.adapter is not None}
        return card

    @asynccontextmanager
    async def _unexpired(self, name: str, access: AdapterAccess) -> AsyncIterator[None]:
        """Keeps an adapter from expiring during the block: other tenants may go before its job."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(_RENEW_S)
                with suppress(StoreError):
                    await self._blocking(access, partial(self._generated.keep, name, _SLACK_S))

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()

    async def _train(self, job: Job, attempt: _Attempt) -> Learnt:
        """Raises JobCancelled: at once if training has not begun, else within a step."""
        stop = attempt.stop
        if stop.is_set():
            raise JobCancelled

        def report(progress: LearningProgress) -> None:
            if stop.is_set():
                raise JobCancelled
            _show_progress(job, progress)

        tenant = attempt.access.tenant or ""
        await take_turn(self._turns, tenant, stop)
        try:
            learnt = await self._learner.learn(
                attempt.request, attempt.pairs, tenant, attempt.budget_s - _STORE_S, report
            )
        except (StoreError, ApiError, JobCancelled):
            raise
        except Exception as error:
            _log.exception("learning from examples failed", extra={"part": "generator"})
            raise unavailable(
                "learning from examples failed; the server's log says why. A draft stays as it is",
                "generator_unavailable",
            ) from error
        finally:
            self._turns.release(tenant)
        if stop.is_set():
            raise JobCancelled
        return learnt

    async def _blocking(self, access: AdapterAccess, work: Callable[[], _T]) -> _T:
        return await self._changes.run(access.tenant, work)


def _no_adapter_yet(submitted: Submitted) -> ApiError:
    """The error for a request that needs an adapter while its description is refused."""
    job, refusal = submitted.job, submitted.refusal
    assert job is not None
    assert refusal is not None
    error = from_store(refusal, access=job.access)
    error.message = (
        f"there is no adapter to answer with: {refusal}. The examples are being "
        f"learnt: wait for /v1/jobs/{job.id} and send the request again, or send "
        '"wait": true in the adapter'
    )
    error.details["job"] = job.id
    return error


def _show_progress(job: Job, progress: LearningProgress) -> None:
    if job.learning is not None:
        nll = None if progress.held_out_nll is None else round(progress.held_out_nll, 4)
        job.learning |= {"step": progress.step, "held_out_nll": nll}
    job.tell(progress.stage, progress.share)
