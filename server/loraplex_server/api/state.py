"""The state of one application: built by ``build_app`` and passed to every route."""

from collections.abc import Callable
from time import time
from typing import Annotated, TypeVar

from fastapi import Depends
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.requests import Request

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.adding.arriving_bytes import ArrivingBytes
from loraplex_server.adapters.adding.sources import AllowedSources
from loraplex_server.adapters.device_tier import DeviceUnloads
from loraplex_server.adapters.resolving.access import check_allowed, follow_names
from loraplex_server.adapters.resolving.resolver import AdapterResolver
from loraplex_server.adapters.tinker.checkpoints import Checkpoints
from loraplex_server.adapters.tinker.sessions import Sessions
from loraplex_server.api.batches.file_checks import FileChecks
from loraplex_server.api.batches.runner import BatchRunner
from loraplex_server.api.request_info import RequestInfo, access_of, info_of
from loraplex_server.call_log import CallRecord
from loraplex_server.engine.requests.client import EngineClient, TenantShare
from loraplex_server.errors import from_store, unavailable
from loraplex_server.metrics.collector import LoraplexCollector
from loraplex_server.metrics.live_view import LiveView
from loraplex_server.metrics.server_metrics import ServerMetrics
from loraplex_server.settings.api_keys import EVERY_ADAPTER, AdapterAccess
from loraplex_server.settings.config import ServerConfig
from loraplex_server.tenant_shares import TenantThreads
from loraplex_server.text.text_pipeline import TextPipeline

from .fine_tuning.runner import FineTuning
from .fleet import Fleet
from .parts import (
    AdapterMakers,
    AdapterSelection,
    ServedEngine,
    ServedModel,
    Telemetry,
    Workers,
)
from .serving.responses.response_store import ResponseStore
from .serving.text_generation.engine_call import EngineCall
from .serving.text_generation.grammars import Grammars
from .serving.vectors.label_vectors import LabelVectors
from .validation import UnknownFields

T = TypeVar("T")


class Lifecycle:
    """Decides which requests the server admits."""

    def __init__(self, engine: EngineClient) -> None:
        self.is_draining = False  # running requests finish, and no others are admitted
        self._engine = engine

    def check_admitting(self) -> None:
        """Raises ApiError (503 with Retry-After) while draining, or when the engine is dead."""
        self.check_engine()
        if self.is_draining:
            raise unavailable("the server is shutting down; ask another replica", "server_draining")

    def check_engine(self) -> None:
        """Raises ApiError (503) when the engine is dead."""
        if not self._engine.alive:
            raise unavailable("the engine has stopped", "engine_dead")


class AppState:
    """The parts that routes use. The attributes are set once."""

    def __init__(
        self,
        served: ServedEngine,
        store: AdapterStore,
        model: ServedModel,
        config: ServerConfig,
        *,
        selection: AdapterSelection,
        makers: AdapterMakers,
        workers: Workers,
        telemetry: Telemetry,
        fleet: Fleet | None,
    ) -> None:
        """``fleet``: the other processes of a cluster; None: this process is the whole server."""
        engine: EngineClient = served.client
        names = config.http.served_model_names or (model.name,)
        self.engine, self.store, self.model, self.config = engine, store, model, config
        self.makers, self.fleet = makers, fleet
        self.started = int(time())  # seconds since the epoch
        self.lifecycle = Lifecycle(engine)
        self.pools, self.jobs = workers.pools, workers.jobs
        self.batches: BatchRunner  # set by ``build_app``: the runner calls the application
        self.fine_tuning: FineTuning | None = None  # set by ``build_app``

        self.device, self.experts = served.tier, served.experts
        self.unloads = DeviceUnloads(served.tier)
        self.semantic, self.refused_folders = selection.router, selection.refused_folders
        self.resolver = AdapterResolver(
            store,
            names,
            self.pools,
            selection.router,
            selection.descriptions,
            None if model.encoder is None else model.encoder.name,
            selection.refused_folders,
        )

        self.health_tracker = telemetry.health_tracker
        self.registry = CollectorRegistry(auto_describe=False)
        self.metrics = ServerMetrics(self.registry, names[0])
        self.collector = LoraplexCollector(
            engine,
            store,
            self.metrics,
            self.health_tracker,
            config.engine,
            names[0],
            with_engine=fleet is None,
        )
        self.registry.register(self.collector)
        ProcessCollector(registry=self.registry)
        for collector in telemetry.collectors:
            self.registry.register(collector)
        self.live_view = LiveView(engine, store, self.metrics, self.collector)

        self.text = TextPipeline(
            model.tokenizer,
            vocab_size=model.vocab_size,
            max_model_len=engine.max_model_len,
            images=model.images,
            image_threads=self.pools.images,
        )
        self.grammars = Grammars(
            self.text.backend, vocab_size=self.text.vocab_size, eos_token_ids=engine.eos_token_ids
        )
        self.live: set[EngineCall] = set()  # running calls, which a shutdown may fail
        learning = config.learning
        self.sessions = Sessions(
            max_runs=learning.max_training_clients, idle_s=learning.session_timeout_s
        )
        self.checkpoints = Checkpoints(store.root / "checkpoints")
        self.file_checks = FileChecks()
        self.arriving, self.arriving_files = ArrivingBytes(), ArrivingBytes()
        self.responses = ResponseStore(config.http.response_store_bytes, config.http.response_ttl_s)
        self.unknown_fields = UnknownFields()
        self.label_vectors = LabelVectors()

    def now(self) -> int:
        """Return the seconds since the epoch."""
        return int(time())

    def begin_call(self, request: Request) -> tuple[RequestInfo, CallRecord]:
        """Log a call for text or vectors from now on, even if the call is refused.

        Calls of one request, which has a prompt for each of several adapters, share their record.
        """
        info = info_of(request.scope)
        if info.record is None:
            info.record = CallRecord(info.id, request.scope["path"], info.tenant)
            self.metrics.calls.begin(info.record)
        return info, info.record


async def state_of(request: Request) -> AppState:
    """Return the application's state. A coroutine, since FastAPI runs functions in a thread."""
    state = request.app.state.parts
    assert isinstance(state, AppState)
    return state


async def _access_of(request: Request) -> AdapterAccess:
    return access_of(request)


async def _tenant_of(request: Request) -> str:
    return info_of(request.scope).tenant


async def _share_of(request: Request) -> TenantShare:
    return info_of(request.scope).share


# Parameters of routes.
State = Annotated[AppState, Depends(state_of)]
Access = Annotated[AdapterAccess, Depends(_access_of)]  # of the API key
Tenant = Annotated[str, Depends(_tenant_of)]
Share = Annotated[TenantShare, Depends(_share_of)]  # of the tenant in the engine


def allowed_sources(state: AppState) -> AllowedSources:
    """Return the sources from which clients may load adapters."""
    return AllowedSources(state.config.store.allow_sources, state.store.allowed_roots)


async def followed(state: AppState, access: AdapterAccess, name: str, *, param: str) -> None:
    """Bring ``name`` up to date with the catalogue. Raises ApiError (403, 503)."""
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
    pool: TenantThreads | None = None,
    param: str = "name",
) -> T:
    """Run a blocking call of the store off the event loop. ``pool`` defaults to that of reads.

    Reads of a store with a catalogue may wait for the network, so they have a pool of their own.
    Raises ApiError for the field ``param``.
    """
    reads = state.pools.catalogue if state.store.is_shared else state.pools.reads
    try:
        return await (pool or reads).run(access.tenant, work)
    except StoreError as error:
        raise from_store(error, param=param, access=access) from error


async def in_change_thread(state: AppState, work: Callable[[], T], access: AdapterAccess) -> T:
    """Run a blocking change of the store off the event loop. Raises ApiError."""
    return await in_store_thread(state, work, access, pool=state.pools.changes)


async def in_load_thread(state: AppState, work: Callable[[], T], access: AdapterAccess) -> T:
    """Run a call of the store that may load an adapter, on a loading thread of the tenant.

    Raises ApiError.
    """
    return await in_store_thread(state, work, access, pool=state.pools.loads)
