"""The present state of the server, the processes of its cluster, and the last calls."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.request_info import check_sees_all
from loraplex_server.api.state import Access, AppState, State, Tenant, in_store_thread
from loraplex_server.api.streaming.sse import SseResponse

router = APIRouter(tags=["Watching"])
_EVERY_S = 0.5  # between two events of a stream


class Call(BaseModel):
    """A call for text or vectors. Times are null while they are unknown."""

    id: str
    path: str
    tenant: str | None
    started: float  # seconds since the epoch
    state: Literal["waiting", "answering", "ended", "failed"]  # waiting: no token yet
    adapter: str | None  # ``name@digest`` or ``base``; null: not resolved
    chosen_by: Literal["base", "name", "mixture", "auto", "description"]
    n_choices: int
    prompt_tokens: int
    output_tokens: int
    load_s: float | None  # wait for the adapter
    queue_s: float | None
    first_token_s: float | None
    seconds: float | None
    status: int | None
    error: str | None
    prompt: str | None  # start of the prompt, on servers with --show-prompts


class RequestList(BaseModel):
    object: Literal["list"]
    running: list[Call]
    data: list[Call]  # the last calls that have ended, newest first


class Share(BaseModel):
    used: int
    total: int | None


class EngineState(BaseModel):
    alive: bool
    running: int
    waiting: int
    steps: int
    step_age_s: float
    preemptions: int
    kv_pages: Share


class TokenRates(BaseModel):
    prompt: float
    output: float


class Percentiles(BaseModel):
    """Percentiles of the last minute."""

    n: int
    p50: float | None
    p95: float | None
    p99: float | None


class AdapterTiers(BaseModel):
    registered: int
    device: list[str]
    slots: int
    host: int
    loads: int
    evictions: int
    mean_load_s: float


class TierShares(BaseModel):
    device: Share
    host: Share
    disk: Share


class Move(BaseModel):
    time: float
    kind: Literal["loaded", "evicted"]
    adapter: str


class Live(BaseModel):
    object: Literal["live"]
    time: float
    engine: EngineState
    tokens_per_s: TokenRates
    first_token_s: Percentiles
    gap_s: Percentiles
    adapters: AdapterTiers
    bytes: TierShares
    rows: list[Call]  # running calls, oldest first
    moves: list[Move]  # loads and evictions while a client watched


class HeldAdapter(BaseModel):
    name: str  # or the first digits of the digest
    digest: str
    tier: Literal["device", "host"]
    running: int  # requests
    waiting: int
    requests: int  # since the replica's start


class MemoryShares(BaseModel):
    device: Share
    host: Share


class EngineProcess(BaseModel):
    replica: str  # the label of /metrics
    alive: bool  # the engine runs and moves
    running: int  # requests
    waiting: int
    rows: Share  # rows of a step; each running request has one
    steps: int
    step_age_s: float
    preemptions: int
    kv_pages: Share
    bytes: MemoryShares  # of adapters
    slots: int  # places for adapters on the device
    loads: int  # adapters loaded to the device since the start
    evictions: int
    adapters: list[HeldAdapter]  # device first; at most some hundreds


class FrontProcess(BaseModel):
    replica: str
    role: Literal["gateway", "coordinator"]
    calls: int  # running calls for text and vectors
    answers: bool  # the process that answers this request


class Cluster(BaseModel):
    name: str  # of Ray's application
    age_s: float  # age of the engines' reports
    engines: list[EngineProcess]
    fronts: list[FrontProcess]


class ClusterAnswer(BaseModel):
    object: Literal["cluster"]
    cluster: Cluster | None  # null: the server is one process


@router.get("/v1/live", response_model=Live, responses=errors())
async def live(request: Request, state: State) -> Response:
    """Return the rows, queue, memory, rates and percentiles of this moment."""
    check_sees_all(request)
    return ORJSONResponse(await _live(state))


# Not in the schema: a tool that tries every route would wait for the end of an endless answer.
@router.get("/v1/live/events", include_in_schema=False)
async def follow(request: Request, state: State) -> Response:
    """Stream /v1/live twice a second, until the client leaves or the server stops."""
    check_sees_all(request)

    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield b"data: " + orjson.dumps(await _live(state)) + b"\n\n"
            if not state.engine.alive or state.lifecycle.is_draining:
                return
            await asyncio.sleep(_EVERY_S)

    return SseResponse(events(), ping_s=state.config.http.ping_interval_s)


@router.get("/v1/requests", response_model=RequestList, responses=errors())
async def requests(access: Access, tenant: Tenant, state: State) -> Response:
    """Return the running calls for text and vectors, and the key's calls of the last 200."""
    only = None if access.tenant is None else tenant
    if state.fleet is not None:
        running, ended = await state.fleet.calls(only)
    else:
        calls = state.metrics.calls
        running = [record.to_json() for record in calls.running(only)]
        ended = [record.to_json() for record in calls.ended(only)]
    return ORJSONResponse({"object": "list", "running": running, "data": ended})


@router.get("/v1/cluster", response_model=ClusterAnswer, responses=errors())
async def cluster(request: Request, state: State) -> Response:
    """Return the engine replicas, with queues and adapters by tier, and the HTTP processes.

    ``cluster`` is null on a server that is one process.
    """
    check_sees_all(request)
    view = None
    if state.fleet is not None:
        await in_store_thread(state, state.collector.refresh_listing)
        view = await state.fleet.view(state.collector)
    return ORJSONResponse({"object": "cluster", "cluster": view})


async def _live(state: AppState) -> dict[str, object]:
    await in_store_thread(state, state.collector.refresh_listing)
    seen = state.live_view.to_json()
    return seen if state.fleet is None else await state.fleet.live(seen)
