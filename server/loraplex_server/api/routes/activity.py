"""What the server does now, and the calls that it answered last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import orjson
from fastapi import APIRouter, Request, Response

from loraplex_server.adapters.access import access_of, check_sees_all
from loraplex_server.api.lifecycle import ServerStatus
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.activity import Live, RequestList
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import info_of
from loraplex_server.api.state import AppState, State, in_store_thread
from loraplex_server.api.streaming.sse import SseResponse

__all__ = ["router"]

router = APIRouter()
_EVERY_S = 0.5  # between two events of a stream


@router.get("/v1/live", response_model=Live, responses=errors())
async def live(request: Request, state: State) -> Response:
    """Rows, queue, memory, rates and percentiles of this moment."""
    check_sees_all(request)
    return ORJSONResponse(await _now(state))


# Not in the schema: whoever tries all of it would wait for the end of an answer that has none.
@router.get("/v1/live/events", include_in_schema=False)
async def follow(request: Request, state: State) -> Response:
    """The same twice a second, as server-sent events, until the client leaves or the
    server goes down."""
    check_sees_all(request)

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: " + orjson.dumps(await _now(state)) + b"\n\n"
            if not state.engine.alive or state.lifecycle.status is not ServerStatus.READY:
                return
            await asyncio.sleep(_EVERY_S)

    return SseResponse(events(), ping_s=state.config.http.ping_interval_s)


@router.get("/v1/requests", response_model=RequestList, responses=errors())
async def requests(request: Request, state: State) -> Response:
    """Calls for text and vectors: those that run, and of the last 200 the key's own."""
    tenant = None if access_of(request).tenant is None else info_of(request.scope).tenant
    if state.fleet is not None:
        running, ended = await state.fleet.calls(tenant)
    else:
        calls = state.metrics.calls
        running = [record.to_json() for record in calls.running(tenant)]
        ended = [record.to_json() for record in calls.ended(tenant)]
    return ORJSONResponse({"object": "list", "running": running, "data": ended})


async def _now(state: AppState) -> dict[str, object]:
    await in_store_thread(state, state.collector.refresh_listing)
    seen = state.live_view.to_json()
    return seen if state.fleet is None else await state.fleet.live(seen)
