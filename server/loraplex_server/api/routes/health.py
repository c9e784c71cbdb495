"""Probes, which need no API key."""

from fastapi import APIRouter, Response

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import answers_only
from loraplex_server.api.protocol.health import Status
from loraplex_server.api.state import AppState, State
from loraplex_server.errors import unavailable
from loraplex_server.settings.api_keys import Scope

router = APIRouter(tags=["Watching"])


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Status, responses=answers_only(503))
async def health(state: State) -> Response:
    """Liveness: the event loop answers, and the engine thread lives and moves.

    While a part of the server keeps failing, the status is 200 and the body names the part, the
    problem and the time. ``lost_at_start`` names kernels of a GPU that failed when it started.
    """
    if not state.engine.alive:
        raise unavailable("the engine has stopped", "engine_dead")
    stats = state.engine.stats()
    if stats.n_running and stats.step_age_s > state.config.http.stall_s:
        raise unavailable(
            f"the engine has not moved for {stats.step_age_s:.0f} s", "engine_stalled"
        )
    elsewhere = () if state.fleet is None else state.fleet.degraded
    degraded = [part.to_json() for part in (*state.health_tracker.degraded, *elsewhere)]
    body: dict[str, object] = {"status": "degraded" if degraded else "ok"}
    if degraded:
        body["degraded"] = degraded
    if stats.lost_at_start:
        body["lost_at_start"] = [lost._asdict() for lost in stats.lost_at_start]
    return ORJSONResponse(body)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Status, responses=answers_only(503))
async def ready(state: State) -> Response:
    """Readiness: the server admits new requests of at least one tenant.

    Each tenant has its own queue. One full queue must not take the server from other tenants.
    """
    if not state.engine.alive:
        raise unavailable("the engine has stopped", "engine_dead")
    if state.lifecycle.is_draining:
        raise unavailable("the server is shutting down", "server_draining")
    limits = _queue_limits(state)
    n_full = sum(state.engine.n_queued(tenant) >= limit for tenant, limit in limits.items())
    if n_full == len(limits):
        raise unavailable("the queue is full", "queue_full", retry_after_s=1.0)
    return ORJSONResponse({"status": "ready"} | ({"full_queues": n_full} if n_full else {}))


@router.head("/ping", include_in_schema=False)
@router.get("/ping", response_model=Status, responses=answers_only(503))
async def ping(state: State) -> Response:
    return await health(state)


def _queue_limits(state: AppState) -> dict[str, int]:
    """Return tenant → requests that may wait. Without keys there is one tenant."""
    most = state.config.engine.max_queue
    keys = [key for key in state.config.http.api_keys if Scope.INFER in key.scopes]
    return {key.tenant: key.max_queued or most for key in keys} or {"": most}
