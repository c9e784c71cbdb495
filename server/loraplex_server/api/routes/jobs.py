"""/v1/jobs: work that goes on after an answer of 202."""

from collections.abc import AsyncGenerator
from typing import Annotated

import orjson
from fastapi import APIRouter, Path, Response

from loraplex_server.adapters.learning.jobs import Job
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import JobShown
from loraplex_server.api.protocol.errors import errors, only_events
from loraplex_server.api.state import Access, AppState, State
from loraplex_server.api.streaming.sse import SseResponse
from loraplex_server.errors import not_found
from loraplex_server.settings.api_keys import AdapterAccess

router = APIRouter(tags=["Training"])
_Id = Annotated[str, Path(max_length=128)]


@router.get("/v1/jobs/{job_id}", response_model=JobShown, responses=errors(404))
async def show_job(job_id: _Id, access: Access, state: State) -> Response:
    return ORJSONResponse(_job(state, access, job_id).to_json())


@router.get("/v1/jobs/{job_id}/events", response_class=Response, responses=only_events(errors(404)))
async def follow_job(job_id: _Id, access: Access, state: State) -> Response:
    """Stream the job now and after every change. The last event has its end."""
    job = _job(state, access, job_id)

    async def events() -> AsyncGenerator[bytes, None]:
        async for now in state.jobs.follow(job):
            yield b"data: " + orjson.dumps(now.to_json()) + b"\n\n"

    return SseResponse(events(), ping_s=state.config.http.ping_interval_s)


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobShown, responses=errors(404, 409))
async def cancel_job(job_id: _Id, access: Access, state: State) -> Response:
    """Ask a job that learns from examples to stop. It stops within a training step.

    Its draft stays. A job that has ended is returned unchanged.
    """
    job = _job(state, access, job_id)
    state.jobs.cancel(job)
    return ORJSONResponse(job.to_json())


def job_response(job: Job) -> Response:
    """Answer with a job that goes on, and its location."""
    return ORJSONResponse(job.to_json(), status=202, headers={"location": f"/v1/jobs/{job.id}"})


def _job(state: AppState, access: AdapterAccess, job_id: str) -> Job:
    """Return a job that the caller may see. Raises ApiError (404)."""
    job = state.jobs.get(job_id, access)
    if job is None:
        raise not_found(
            f"job {job_id[:64]!r} does not exist, or has been forgotten", "job_id", "job_not_found"
        )
    return job
