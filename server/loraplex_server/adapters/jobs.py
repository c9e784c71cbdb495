"""Loads that take long: each runs once, can be polled, and is remembered for a while."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import StoreError
from loraplex_server.api.errors import ApiError, from_engine, from_fault, from_store
from loraplex_server.engine.errors import EngineError
from loraplex_server.faults import Faults

__all__ = ["Job", "JobStatus", "Jobs", "Progress"]

Progress = Callable[[str, float], None]  # stage, share done; called from the working thread
_MAX_KEPT = 1000
_log = logging.getLogger(__name__)


class JobStatus(Enum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(slots=True)
class Job:
    id: str
    adapter: str
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
            "adapter": self.adapter,
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

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def start(self, adapter: str, work: Callable[[Progress], AdapterCard]) -> Job:
        """``work`` gets a progress callback. A client that leaves does not stop it."""
        job = Job(f"job-{uuid.uuid4().hex}", adapter)
        self._jobs[job.id] = job
        self._forget_old()
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
            job.status, job.error = JobStatus.FAILED, from_store(error, param="source")
        except EngineError as error:
            job.status, job.error = JobStatus.FAILED, from_engine(error)
        except ApiError as error:
            job.status, job.error = JobStatus.FAILED, error
        except Exception as error:
            _log.exception("%s for adapter %r failed", job.id, job.adapter)
            self._faults.unforeseen(error)
            job.status, job.error = JobStatus.FAILED, from_fault(error, job.id)

    def _forget_old(self) -> None:
        for job_id in list(self._jobs)[: max(0, len(self._jobs) - _MAX_KEPT)]:
            if self._jobs[job_id].status is not JobStatus.RUNNING:
                del self._jobs[job_id]
