"""Work that takes long: each job runs once, can be polled or followed, and is remembered a while.

A tenant sees and forgets only its own. Some jobs can be cancelled, others run to their end.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import StoreError
from loraplex_server.api.errors import ApiError, from_engine, from_fault, from_store, too_many
from loraplex_server.api_keys import AdapterAccess
from loraplex_server.engine.errors import EngineError
from loraplex_server.faults import Faults

__all__ = ["Job", "JobCancelled", "JobStatus", "Jobs", "Progress"]

Progress = Callable[[str, float], None]  # stage, share done; called from the working thread
_LEAST_GAP_S = 0.1  # between two states that a follower is told
_MAX_KEPT = 1000  # of a tenant
_log = logging.getLogger(__name__)


class JobStatus(Enum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobCancelled(Exception):
    """Raised by the work of a job that ``Jobs.cancel`` was called for."""


@dataclass(slots=True)
class Job:
    id: str
    adapter: str  # as the store knows it
    access: AdapterAccess  # of the key that asked
    created: float = field(default_factory=time.time)  # seconds since the epoch
    status: JobStatus = JobStatus.RUNNING
    stage: str = "queued"
    progress: float = 0.0  # share done of the stage
    card: AdapterCard | None = None
    error: ApiError | None = None
    learning: dict[str, object] | None = None  # how far one that learns from examples is
    training: dict[str, object] | None = None  # how far one that trains on chats is
    cancel: Callable[[], None] | None = None  # None: it runs to its end
    param: str = "source"  # the field that errors of the store name
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set, and replaced, at a change

    @classmethod
    def lost(cls, id: str, card: AdapterCard, access: AdapterAccess, error: ApiError | None) -> Job:
        """One of which the adapter that it left is all that is known. No error: cancelled."""
        status = JobStatus.CANCELLED if error is None else JobStatus.FAILED
        job = cls(id, card.name, access, card.created, status, "lost")
        job.card, job.error = card, error
        return job

    @property
    def has_ended(self) -> bool:
        return self.status is not JobStatus.RUNNING

    def tell(self, stage: str, progress: float) -> None:
        """On the event loop."""
        self.stage, self.progress = stage, progress
        self.announce()

    def announce(self) -> None:
        """Wakes those who follow the job."""
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
    """Owned by the event loop; the work itself runs in ``executor``."""

    def __init__(self, executor: Executor, faults: Faults) -> None:
        self._executor = executor
        self._faults = faults
        self._jobs: dict[str, Job] = {}

    def get(self, job_id: str, access: AdapterAccess) -> Job | None:
        """None also for a job of another tenant, or of an adapter that the key may not use."""
        job = self._jobs.get(job_id)
        if job is None or access.tenant not in (None, job.access.tenant):
            return None
        return job if access.allows(job.adapter) else None

    def __contains__(self, job_id: str) -> bool:
        """Whether it is remembered, whoever may see it."""
        return job_id in self._jobs

    def runs(self, job_id: str) -> bool:
        """Any thread."""
        job = self._jobs.get(job_id)
        return job is not None and not job.has_ended

    def start(
        self, adapter: str, access: AdapterAccess, work: Callable[[Progress], AdapterCard]
    ) -> Job:
        """``work`` blocks, and gets a progress callback. A client that leaves does not stop it.

        Raises ApiError (429) if as many of the tenant's run as may.
        """

        async def run(job: Job) -> AdapterCard:
            loop = asyncio.get_running_loop()

            def report(stage: str, share: float) -> None:
                loop.call_soon_threadsafe(job.tell, stage, share)

            return await loop.run_in_executor(self._executor, work, report)

        return self.start_task(adapter, access, run)

    def start_task(
        self,
        adapter: str,
        access: AdapterAccess,
        work: Callable[[Job], Awaitable[AdapterCard]],
        *,
        param: str = "source",
    ) -> Job:
        """``work`` runs on the event loop; it may set ``Job.cancel`` and then raise JobCancelled.

        Raises ApiError (429) as ``start`` does.
        """
        ours = [job for job in self._jobs.values() if job.access.tenant == access.tenant]
        n_running = sum(not job.has_ended for job in ours)
        if access.max_jobs is not None and n_running >= access.max_jobs:
            raise too_many(
                f"max_jobs: this tenant may run {access.max_jobs} jobs at a time and does; wait "
                "for one to end, or ask the operator for more",
                "quota_exceeded",
                1.0,
            )
        job = Job(f"job-{uuid.uuid4().hex}", adapter, access, param=param)
        self._jobs[job.id] = job
        self._forget_old([*ours, job])
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    def cancel(self, job: Job) -> None:
        """Asks it to stop; nothing for one that has ended. Raises ApiError (409)."""
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
        """The job now and after changes, at most ten times a second; ends with its last state."""
        while not job.has_ended:
            changed = job.changed
            yield job
            await asyncio.sleep(_LEAST_GAP_S)
            await changed.wait()
        yield job

    async def wait(self, job: Job, timeout_s: float | None) -> bool:
        """Whether the job ended in time."""
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
            error.__cause__ = error.__context__ = error.__traceback__ = None  # they hold frames
        except Exception as error:
            _log.exception("%s for adapter %r failed", job.id, job.adapter)
            self._faults.unforeseen(error)
            job.status, job.error = JobStatus.FAILED, from_fault(error, job.id)
        finally:
            job.cancel = None  # it may hold what was learnt
            job.announce()

    def _forget_old(self, of_tenant: Sequence[Job]) -> None:
        for job in of_tenant[: max(0, len(of_tenant) - _MAX_KEPT)]:
            if job.has_ended:
                del self._jobs[job.id]
