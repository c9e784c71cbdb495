"""/v1/batches: many calls at once, answered while the server has nothing better to do."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.batches import Batch, BatchBody, BatchList
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import BatchCaller, info_of
from loraplex_server.api.state import State

from .files import page

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/batches", response_model=Batch, responses=errors(404, 415))
async def create_batch(body: BatchBody, request: Request, state: State) -> Response:
    """Answers each line of the file in the name of this key, within 24 hours."""
    state.lifecycle.check_admitting()
    info = info_of(request.scope)
    caller = BatchCaller(info.key_id, info.tenant)
    batches = state.batches
    batch = await batches.do(
        lambda: batches.store.add_batch(caller, body.input_file_id, body.endpoint, body.metadata)
    )
    batches.wake(info.tenant)
    return ORJSONResponse(batch.to_json())


@router.get("/v1/batches", response_model=BatchList, responses=errors())
async def list_batches(
    request: Request,
    state: State,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """The newest first."""
    tenant = info_of(request.scope).tenant
    store = state.batches.store
    found, more = await state.batches.do(lambda: store.batches(tenant, limit=limit, after=after))
    return page([batch.to_json() for batch in found], has_more=more)


@router.get("/v1/batches/{batch_id}", response_model=Batch, responses=errors(404))
async def show_batch(
    request: Request,
    batch_id: str,
    state: State,
    timeout_s: Annotated[float, Query(ge=0, le=60, allow_inf_nan=False)] = 0.0,
) -> Response:
    """``?timeout_s=30`` answers when the batch has ended, at most so much later."""
    batch = await state.batches.wait(info_of(request.scope).tenant, batch_id, timeout_s)
    return ORJSONResponse(batch.to_json())


@router.post("/v1/batches/{batch_id}/cancel", response_model=Batch, responses=errors(404, 409))
async def cancel_batch(request: Request, batch_id: str, state: State) -> Response:
    """What was answered stays; nothing further is."""
    batch = await state.batches.cancel(info_of(request.scope).tenant, batch_id)
    return ORJSONResponse(batch.to_json())
