"""Probes, version and metrics."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from loraplex_server.adapters.access import access_of
from loraplex_server.api.errors import ApiError, unavailable
from loraplex_server.api.lifecycle import ServerStatus
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.state import State, in_store_thread

__all__ = ["router"]

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(state: State) -> Response:
    """Liveness: the event loop answers, the engine thread lives and moves."""
    if not state.engine.alive:
        raise unavailable("the engine has stopped", "engine_dead")
    stats = state.engine.stats()
    if stats.n_running and stats.step_age_s > state.config.http.stall_s:
        raise unavailable(
            f"the engine has not moved for {stats.step_age_s:.0f} s", "engine_stalled"
        )
    return ORJSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(state: State) -> Response:
    """Readiness: new requests would be taken in now."""
    if not state.engine.alive:
        raise unavailable("the engine has stopped", "engine_dead")
    if state.lifecycle.status is not ServerStatus.READY:
        raise unavailable("the server is shutting down", "server_draining")
    if state.engine.stats().n_waiting >= state.config.engine.max_queue:
        raise unavailable("the queue is full", "queue_full", retry_after_s=1.0)
    return ORJSONResponse({"status": "ready"})


@router.head("/ping", include_in_schema=False)
@router.get("/ping")
async def ping(state: State) -> Response:
    return await health(state)


@router.get("/version")
async def version() -> Response:
    return ORJSONResponse({"version": installed_version("loraplex")})


@router.get("/metrics")
async def metrics(request: Request, state: State) -> Response:
    if access_of(request).patterns is not None:
        raise ApiError(
            403,
            "this API key is limited to some adapters, and the metrics tell of all of them",
            code="metrics_not_allowed",
        )
    await in_store_thread(state, state.collector.refresh_listing)
    text = generate_latest(state.registry)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
