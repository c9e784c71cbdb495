"""/v1/batches: many calls in one file, answered while the server is idle."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.body import Body, Metadata, Name
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import BatchCaller, info_of
from loraplex_server.api.state import State, Tenant

from .files import After, Page, page_of

router = APIRouter(route_class=JsonRoute, tags=["Files and batches"])

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


class BatchBody(Body):
    input_file_id: Name
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class _Problem(BaseModel):
    code: str
    message: str
    line: int | None
    param: str | None


class _Problems(BaseModel):
    object: Literal["list"]
    data: list[_Problem]


class _Counts(BaseModel):
    total: int
    completed: int
    failed: int


class Batch(BaseModel):
    """A batch. Times are in seconds since the epoch."""

    model_config = ConfigDict(title="Batch")

    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    errors: _Problems | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: _Counts
    metadata: dict[str, str] | None


class BatchList(Page):
    data: list[Batch]


@router.post("/v1/batches", response_model=Batch, responses=errors(404, 415))
async def create_batch(body: BatchBody, request: Request, state: State) -> Response:
    """Answer each line of the file under this API key, within 24 hours."""
    state.lifecycle.check_admitting()
    info, batches = info_of(request.scope), state.batches
    caller = BatchCaller(info.key_id, info.tenant)
    batch = await batches.do(
        info.tenant,
        lambda: batches.store.add_batch(caller, body.input_file_id, body.endpoint, body.metadata),
    )
    batches.wake(info.tenant)
    return ORJSONResponse(batch.to_json())


@router.get("/v1/batches", response_model=BatchList, responses=errors())
async def list_batches(
    tenant: Tenant,
    state: State,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: After = None,
) -> Response:
    """List the newest batches first."""
    store = state.batches.store
    batches, more = await state.batches.do(
        tenant, lambda: store.batches(tenant, limit=limit, after=after)
    )
    return page_of([batch.to_json() for batch in batches], has_more=more)


@router.get("/v1/batches/{batch_id}", response_model=Batch, responses=errors(404))
async def show_batch(
    batch_id: str,
    tenant: Tenant,
    state: State,
    timeout_s: Annotated[float, Query(ge=0, le=60, allow_inf_nan=False)] = 0.0,
) -> Response:
    """Return the batch. ``?timeout_s=30`` waits up to 30 seconds for its end."""
    batch = await state.batches.wait(tenant, batch_id, timeout_s)
    return ORJSONResponse(batch.to_json())


@router.post("/v1/batches/{batch_id}/cancel", response_model=Batch, responses=errors(404, 409))
async def cancel_batch(batch_id: str, tenant: Tenant, state: State) -> Response:
    """Stop the batch. Completed answers are kept."""
    batch = await state.batches.cancel(tenant, batch_id)
    return ORJSONResponse(batch.to_json())
