"""Long work as jobs, which clients poll, follow and cancel.

A tenant sees its own jobs, of which the last 1,000 are remembered. Some jobs cannot be cancelled.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.card import AdapterCard
from loraplex_server.engine.errors import EngineError
from loraplex_server.errors import ApiError, from_engine, from_store, from_unexpected, too_many
from loraplex_server.health_tracker import log_extra
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantShares, TenantThreads

Progress = Callable[[str, float], None]  # stage, share done; called from the working thread
_LEAST_GAP_S = 0.1  # between two states that a follower receives
_MAX_JOBS = 1000  # of a tenant that are remembered
_log = logging.getLogger(__name__)


class JobStatus(Enum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobCancelled(Exception):
    """Raised inside a job that has been cancelled."""


@dataclass(slots=True)
class Job:
    """A job and its state. Event loop only."""

    id: str
    adapter: str  # stored name
    access: AdapterAccess  # of the key that started the job
    created: float = field(default_factory=time.time)  # seconds since the epoch
    status: JobStatus = JobStatus.RUNNING
    stage: str = "queued"
    progress: float = 0.0  # completed share of the stage
    card: AdapterCard | None = None
    error: ApiError | None = None
    learning: dict[str, object] | None = None  # progress of learning from examples
    training: dict[str, object] | None = None  # progress of training on chats
    cancel: Callable[[], None] | None = None  # None: the job cannot be cancelled
    param: str = "source"  # the request field that errors of the store name
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set and replaced at each change

    @property
    def has_ended(self) -> bool:
        return self.status is not JobStatus.RUNNING

    def tell(self, stage: str, progress: float) -> None:
        """Set the stage and its completed share."""
        self.stage, self.progress = stage, progress
        self.announce()

    def announce(self) -> None:
        """Wake the followers of the job."""
        self.changed.set()
        self.changed = asyncio.Event()

    def to_json(self) -> dict[str, object]:
        error = None
        if self.error is not None:
            error = {"message": self.error.message, "code": self.error.code}
        return {
            "id": self.id,
            "object": "job",
            "adapter": self.access.shown(self.adapter),
            "created": int(self.created),
            "status": self.status.value,
            "stage": self.stage,
            "progress": round(self.progress, 4),
            "digest": self.card.digest if self.card else None,
            "learning": self.learning,
            "training": self.training,
            "error": error,
        }


class Jobs:
    """Owner of the jobs. Event loop only; ``threads`` run work that blocks."""

    def __init__(self, threads: TenantThreads) -> None:
        self._threads = threads
        self._jobs: dict[str, Job] = {}

    def get(self, job_id: str, access: AdapterAccess) -> Job | None:
        """Return a job, or None if the key may not see the job or its adapter."""
        job = self._jobs.get(job_id)
        if job is None or access.tenant not in (None, job.access.tenant):
            return None
        return job if access.allows(job.adapter) else None

    def runs(self, job_id: str) -> bool:
        """Return True while the job runs. Any thread."""
        job = self._jobs.get(job_id)
        return job is not None and not job.has_ended

    def start(
        self, adapter: str, access: AdapterAccess, work: Callable[[Progress], AdapterCard]
    ) -> Job:
        """Start a job whose ``work`` blocks and reports its progress.

        Raises ApiError (429) if the tenant runs as many jobs as it may, or if too many wait.
        """
        self._threads.check_room(access.tenant or "")

        async def run(job: Job) -> AdapterCard:
            loop = asyncio.get_running_loop()

            def report(stage: str, share: float) -> None:
                loop.call_soon_threadsafe(job.tell, stage, share)

            return await self._threads.run(access.tenant, partial(work, report))

        return self.start_task(adapter, access, run)

    def start_task(
        self,
        adapter: str,
        access: AdapterAccess,
        work: Callable[[Job], Awaitable[AdapterCard]],
        *,
        param: str = "source",
        job_id: str | None = None,
    ) -> Job:
        """Start a job whose ``work`` runs on the event loop and may set ``Job.cancel``.

        ``job_id`` may be that of an ended job, which goes on.

        Raises ApiError (429) if the tenant runs as many jobs as it may.
        """
        ours = [job for job in self._jobs.values() if job.access.tenant == access.tenant]
        n_running = sum(not job.has_ended for job in ours)
        if access.max_jobs is not None and n_running >= access.max_jobs:
            raise too_many(
                f"max_jobs: this tenant runs {access.max_jobs} jobs, which is its limit; wait "
                "for one to end, or ask the operator for more",
                "quota_exceeded",
                1.0,
            )
        job = Job(job_id or f"job-{uuid.uuid4().hex}", adapter, access, param=param)
        self._jobs[job.id] = job
        self._forget_old([*ours, job])
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    def cancel(self, job: Job) -> None:
        """Ask a running job to stop. Raises ApiError (409) if the job cannot be cancelled."""
        if job.has_ended:
            return
        if job.cancel is None:
            raise ApiError(
                409,
                f"job {job.id} cannot be cancelled: it runs to its end",
                code="job_not_cancellable",
                param="job_id",
            )
        job.cancel()

    async def follow(self, job: Job) -> AsyncGenerator[Job, None]:
        """Yield the job now and after each change, at most ten times a second, until it ends."""
        while not job.has_ended:
            changed = job.changed
            yield job
            await asyncio.sleep(_LEAST_GAP_S)
            await changed.wait()
        yield job

    async def wait(self, job: Job, timeout_s: float | None) -> bool:
        """Return True if the job ended in time."""
        assert job.task is not None
        done, _ = await asyncio.wait([job.task], timeout=timeout_s)
        return bool(done)

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[AdapterCard]]) -> None:
        try:
            job.card = await work(job)
            job.status, job.stage, job.progress = JobStatus.SUCCEEDED, "done", 1.0
        except JobCancelled:
            job.status = JobStatus.CANCELLED
        except StoreError as error:
            job.status, job.error = (
                JobStatus.FAILED,
                from_store(error, param=job.param, access=job.access),
            )
        except EngineError as error:
            job.status, job.error = JobStatus.FAILED, from_engine(error)
        except ApiError as error:
            job.status, job.error = JobStatus.FAILED, error
            error.__cause__ = error.__context__ = error.__traceback__ = None  # frees the frames
        except Exception as error:
            _log.exception("%s for adapter %r failed", job.id, job.adapter, extra=log_extra(error))
            job.status, job.error = JobStatus.FAILED, from_unexpected(error, job.id)
        finally:
            job.cancel = None  # the closure may hold tensors
            job.announce()

    def _forget_old(self, of_tenant: Sequence[Job]) -> None:
        for job in of_tenant[: max(0, len(of_tenant) - _MAX_JOBS)]:
            if job.has_ended:
                del self._jobs[job.id]


async def take_turn(turns: TenantShares, tenant: str, stop: asyncio.Event) -> None:
    """Wait for a permit, which the caller releases. Raises JobCancelled if ``stop`` is set first.

    Raises ApiError (429) if the tenant's queue is full.
    """
    turn = asyncio.ensure_future(turns.acquire(tenant))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([turn, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not turn.done():
            raise JobCancelled
        turn.result()
    finally:
        turn.cancel()
        stopping.cancel()
        await asyncio.gather(turn, stopping, return_exceptions=True)
