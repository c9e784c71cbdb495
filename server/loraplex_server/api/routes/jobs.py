"""/v1/jobs: work that was answered with 202."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

import orjson
from fastapi import APIRouter, Path, Request, Response

from loraplex_server.adapters.access import access_of
from loraplex_server.adapters.jobs import Job
from loraplex_server.api.errors import not_found
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import JobShown
from loraplex_server.api.protocol.errors import errors, only_events
from loraplex_server.api.state import AppState, State, in_store_thread
from loraplex_server.api.streaming.sse import SseResponse

__all__ = ["router"]

router = APIRouter()
_Id = Annotated[str, Path(max_length=128)]


@router.get("/v1/jobs/{job_id}", response_model=JobShown, responses=errors(404))
async def show_job(request: Request, job_id: _Id, state: State) -> Response:
    return ORJSONResponse((await _job(state, request, job_id)).to_json())


@router.get("/v1/jobs/{job_id}/events", response_class=Response, responses=only_events(errors(404)))
async def follow_job(request: Request, job_id: _Id, state: State) -> Response:
    """The job now and after every change, as server-sent events; the last one has its end."""
    job = await _job(state, request, job_id)

    async def events() -> AsyncGenerator[bytes, None]:
        async for now in state.jobs.follow(job):
            yield b"data: " + orjson.dumps(now.to_json()) + b"\n\n"

    return SseResponse(events(), ping_s=state.config.http.ping_interval_s)


@router.post("/v1/jobs/{job_id}/cancel", response_model=JobShown, responses=errors(404, 409))
async def cancel_job(request: Request, job_id: _Id, state: State) -> Response:
    """Asks a job that learns from examples to stop, which it does within a training step.

    Its draft stays. One that has ended is shown as it is.
    """
    job = await _job(state, request, job_id)
    state.jobs.cancel(job)
    return ORJSONResponse(job.to_json())


async def _job(state: AppState, request: Request, job_id: str) -> Job:
    """Raises ApiError (404)."""
    access = access_of(request)
    job = state.jobs.get(job_id, access)
    learning = state.learning
    if job is None and learning is not None and job_id not in state.jobs:
        job = await in_store_thread(state, lambda: learning.lost(job_id, access), access)
    if job is None:
        raise not_found(f"job {job_id[:64]!r} is not known (any more)", "job_id", "job_not_found")
    return job
