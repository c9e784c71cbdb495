"""Loads that take long: each runs once, can be polled, and is remembered for a while.

A tenant sees and forgets only its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import StoreError
from loraplex_server.api.errors import ApiError, from_engine, from_fault, from_store, too_many
from loraplex_server.api_keys import AdapterAccess
from loraplex_server.engine.errors import EngineError
from loraplex_server.faults import Faults

__all__ = ["Job", "JobStatus", "Jobs", "Progress"]

Progress = Callable[[str, float], None]  # stage, share done; called from the working thread
_MAX_KEPT = 1000  # of a tenant
_log = logging.getLogger(__name__)


class JobStatus(Enum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


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
    task: asyncio.Task[None] | None = None

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

    def start(
        self, adapter: str, access: AdapterAccess, work: Callable[[Progress], AdapterCard]
    ) -> Job:
        """``work`` gets a progress callback. A client that leaves does not stop it.

        Raises ApiError (429) if as many of the tenant's run as may.
        """
        ours = [job for job in self._jobs.values() if job.access.tenant == access.tenant]
        n_running = sum(job.status is JobStatus.RUNNING for job in ours)
        if access.max_jobs is not None and n_running >= access.max_jobs:
            raise too_many(
                f"max_jobs: this tenant may run {access.max_jobs} loads at a time and does; wait "
                "for one to end, or ask the operator for more",
                "quota_exceeded",
                1.0,
            )
        job = Job(f"job-{uuid.uuid4().hex}", adapter, access)
        self._jobs[job.id] = job
        self._forget_old([*ours, job])
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    async def wait(self, job: Job, timeout_s: float | None) -> bool:
        """Whether the job ended in time."""
        assert job.task is not None
        done, _ = await asyncio.wait([job.task], timeout=timeout_s)
        return bool(done)

    async def _run(self, job: Job, work: Callable[[Progress], AdapterCard]) -> None:
        def report(stage: str, share: float) -> None:
            job.stage, job.progress = stage, share

        loop = asyncio.get_running_loop()
        try:
            job.card = await loop.run_in_executor(self._executor, work, report)
            job.status, job.stage, job.progress = JobStatus.SUCCEEDED, "done", 1.0
        except StoreError as error:
            job.status, job.error = (
                JobStatus.FAILED,
                from_store(error, param="source", access=job.access),
            )
        except EngineError as error:
            job.status, job.error = JobStatus.FAILED, from_engine(error)
        except ApiError as error:
            job.status, job.error = JobStatus.FAILED, error
        except Exception as error:
            _log.exception("%s for adapter %r failed", job.id, job.adapter)
            self._faults.unforeseen(error)
            job.status, job.error = JobStatus.FAILED, from_fault(error, job.id)

    def _forget_old(self, of_tenant: Sequence[Job]) -> None:
        for job in of_tenant[: max(0, len(of_tenant) - _MAX_KEPT)]:
            if job.status is not JobStatus.RUNNING:
                del self._jobs[job.id]
