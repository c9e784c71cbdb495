"""Probes: open to everybody, with and without keys."""

from __future__ import annotations

from fastapi import APIRouter, Response

from loraplex_server.api.errors import unavailable
from loraplex_server.api.lifecycle import ServerStatus
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import answers_only
from loraplex_server.api.protocol.health import Status
from loraplex_server.api.state import AppState, State
from loraplex_server.api_keys import Scope

__all__ = ["router"]

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=Status, responses=answers_only(503))
async def health(state: State) -> Response:
    """Liveness: the event loop answers, the engine thread lives and moves.

    Still 200 while a part of the server keeps failing; the body says which, why and since when.
    """
    if not state.engine.alive:
        raise unavailable("the engine has stopped", "engine_dead")
    stats = state.engine.stats()
    if stats.n_running and stats.step_age_s > state.config.http.stall_s:
        raise unavailable(
            f"the engine has not moved for {stats.step_age_s:.0f} s", "engine_stalled"
        )
    elsewhere = () if state.fleet is None else state.fleet.degraded
    degraded = [part.to_json() for part in (*state.faults.degraded, *elsewhere)]
    if degraded:
        return ORJSONResponse({"status": "degraded", "degraded": degraded})
    return ORJSONResponse({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_model=Status, responses=answers_only(503))
async def ready(state: State) -> Response:
    """Readiness: new requests would be taken in now, of one tenant at least.

    Each tenant has a queue of its own: one that is full must not take the server from the others.
    """
    if not state.engine.alive:
        raise unavailable("the engine has stopped", "engine_dead")
    if state.lifecycle.status is not ServerStatus.READY:
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
    """Tenant → requests of it that may wait; without keys there is one."""
    most = state.config.engine.max_queue
    asking = [key for key in state.config.http.api_keys if Scope.INFER in key.scopes]
    return {key.tenant: key.max_queued or most for key in asking} or {"": most}
