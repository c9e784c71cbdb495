"""What the routes work with: built once by ``build_app``, passed on, never global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import time
from typing import Annotated, TypeVar

from fastapi import Depends
from prometheus_client import CollectorRegistry
from starlette.requests import Request

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.plan import PoolingPlan
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.access import check_allowed, follow_names
from loraplex_server.adapters.device_tier import DeviceTier, DeviceUnloads
from loraplex_server.adapters.encoder_model import EncoderModel
from loraplex_server.adapters.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.jobs import Jobs
from loraplex_server.adapters.learning import Learning
from loraplex_server.adapters.resolver import AdapterResolver
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.adapters.training import Training
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.api.batches.runner import BatchRunner
from loraplex_server.api.request_info import RequestInfo, info_of
from loraplex_server.api.serving.engine_call import LiveCalls
from loraplex_server.api.serving.grammars import Grammars
from loraplex_server.api.serving.response_store import ResponseStore
from loraplex_server.api.serving.text_pipeline import TextPipeline
from loraplex_server.api_keys import EVERY_ADAPTER, AdapterAccess
from loraplex_server.engine.client import EngineClient
from loraplex_server.engine.expert_monitor import ExpertMonitor
from loraplex_server.faults import Faults
from loraplex_server.metrics.call_log import CallRecord
from loraplex_server.metrics.collector import LoraplexCollector
from loraplex_server.metrics.live_view import LiveView
from loraplex_server.metrics.server_metrics import ServerMetrics
from loraplex_server.settings import ServerConfig

from .errors import from_store
from .fleet import Fleet
from .lifecycle import Lifecycle
from .validation import UnknownFields

__all__ = ["AppState", "State", "followed", "in_load_thread", "in_store_thread", "state_of"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AppState:
    engine: EngineClient
    store: AdapterStore
    text: TextPipeline
    grammars: Grammars
    config: ServerConfig
    resolver: AdapterResolver
    unknown_fields: UnknownFields
    metrics: ServerMetrics
    registry: CollectorRegistry
    collector: LoraplexCollector
    responses: ResponseStore
    live: LiveCalls
    live_view: LiveView
    lifecycle: Lifecycle
    jobs: Jobs
    batches: BatchRunner
    pools: WorkerPools  # for the store's blocking calls
    device: DeviceTier | None  # None: the engine does not tell
    unloads: DeviceUnloads
    generated: GeneratedAdapters | None  # None: no adapters from a sentence
    learning: Learning | None  # None: none that learn from examples
    training: Training | None  # None: none that are trained on chats
    semantic: SemanticRouter | None  # None: no ``auto``
    experts: ExpertMonitor | None
    faults: Faults
    encoder: EncoderModel | None  # None: the sentence encoder is not on this machine
    pooling: PoolingPlan  # of the base's embeddings
    fleet: Fleet | None  # None: this process is all there is
    model_root: str  # opaque name of the base's weights: a model id, never a path
    started: int = 0  # seconds since the epoch

    def now(self) -> int:
        return int(time())

    def begin_call(self, request: Request) -> tuple[RequestInfo, CallRecord]:
        """Of a call for text or vectors: it is shown from here on, also if it is refused."""
        info = info_of(request.scope)
        info.record = record = CallRecord(info.id, request.scope["path"], info.tenant)
        self.metrics.calls.begin(record)
        return info, record


async def state_of(request: Request) -> AppState:
    """Asynchronous: FastAPI would run it in a thread, and uploads may hold all of them."""
    state = request.app.state.parts
    assert isinstance(state, AppState)
    return state


State = Annotated[AppState, Depends(state_of)]  # the parameter of a route


async def followed(state: AppState, access: AdapterAccess, name: str, *, param: str) -> None:
    """Before ``stored_name`` or ``own_name`` of it. Raises ApiError (403, 503)."""
    check_allowed(access, name, param=param)
    try:
        await follow_names(state.store, state.pools.catalogue, access, [name])
    except StoreError as error:
        raise from_store(error, param=param, access=access) from error


async def in_store_thread(
    state: AppState,
    work: Callable[[], T],
    access: AdapterAccess = EVERY_ADAPTER,
    *,
    pool: Executor | None = None,
    param: str = "name",
) -> T:
    """Runs a blocking call of the store off the event loop, as a read where no ``pool`` is given.

    A read of a store with a catalogue may wait for the network, apart from other reads.

    Raises ApiError; ``param`` is the field that it names.
    """
    loop = asyncio.get_running_loop()
    reads = state.pools.catalogue if state.store.is_shared else state.pools.reads
    try:
        return await loop.run_in_executor(pool or reads, work)
    except StoreError as error:
        raise from_store(error, param=param, access=access) from error


async def in_load_thread(state: AppState, work: Callable[[], T], access: AdapterAccess) -> T:
    """Runs a call of the store that may load an adapter, on one of its tenant's threads for that.

    Raises ApiError.
    """
    try:
        return await (await state.pools.loads.run(access.tenant or "", work))
    except StoreError as error:
        raise from_store(error, param="name", access=access) from error
