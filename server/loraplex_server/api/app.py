"""Builds the ASGI application from its parts. No globals: two apps in one process are fine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version as installed_version
from time import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import Scope

from loraplex_adapter_store.plan import PoolingMode, PoolingPlan
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.device_tier import DeviceTier, DeviceUnloads
from loraplex_server.adapters.encoder_model import EncoderModel
from loraplex_server.adapters.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.jobs import Jobs
from loraplex_server.adapters.learning import Learning
from loraplex_server.adapters.resolver import AdapterResolver, SelectorResolver
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.adapters.training import Training
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.api.batches.batch_store import BatchLimits, BatchStore
from loraplex_server.api.batches.runner import BatchRunner
from loraplex_server.api.middleware.auth import Auth
from loraplex_server.api.middleware.body_limit import BodyLimit
from loraplex_server.api.middleware.browser_guard import BrowserGuard
from loraplex_server.api.middleware.cors import Cors
from loraplex_server.api.middleware.rate_limit import Meter, RateLimiter
from loraplex_server.api.middleware.request_context import RequestContext
from loraplex_server.api.middleware.tracing import Tracing
from loraplex_server.api.request_info import info_of
from loraplex_server.api.routes import (
    activity,
    adapters,
    batches,
    cluster,
    console,
    files,
    generate,
    generate_adapter,
    guide,
    health,
    lora_compat,
    messages,
    metrics,
    models,
    responses,
    revisions,
    routing,
    tokens,
    train_adapter,
    vectors,
)
from loraplex_server.api.routes import jobs as job_routes
from loraplex_server.api.serving.disconnect import ClientLeft
from loraplex_server.api.serving.engine_call import LiveCalls
from loraplex_server.api.serving.grammars import Grammars
from loraplex_server.api.serving.response_store import ResponseStore
from loraplex_server.api.serving.text_pipeline import ChatTokenizer, TextPipeline
from loraplex_server.api_keys import ApiKey
from loraplex_server.engine.client import EngineClient
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.expert_monitor import ExpertMonitor
from loraplex_server.faults import Faults
from loraplex_server.metrics.collector import LoraplexCollector
from loraplex_server.metrics.live_view import LiveView
from loraplex_server.metrics.server_metrics import ServerMetrics
from loraplex_server.settings import ServerConfig

from .adapter_path import why_not_put
from .errors import ApiError, from_engine
from .exact_schema import write_exact_bounds
from .fleet import Fleet
from .lifecycle import Lifecycle
from .orjson_response import ORJSONResponse
from .state import AppState
from .validation import UnknownFields, problem_of

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["build_app"]

_SHOWN_TO_PAGES = (
    *("etag", "location", "retry-after", "retry-after-ms", "x-loraplex-adapter", "x-request-id"),
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)


def build_app(
    engine: EngineClient,
    store: AdapterStore,
    tokenizer: ChatTokenizer,
    config: ServerConfig,
    *,
    model_name: str = "base",
    vocab_size: int | None = None,
    device: DeviceTier | None = None,
    resolver: SelectorResolver | None = None,
    generated: GeneratedAdapters | None = None,
    learning: Learning | None = None,
    training: Training | None = None,
    pools: WorkerPools | None = None,
    jobs: Jobs | None = None,
    collectors: Sequence[Collector] = (),
    semantic: SemanticRouter | None = None,
    experts: ExpertMonitor | None = None,
    encoder: EncoderModel | None = None,
    pooling: PoolingPlan | None = None,
    tracing: TracerProvider | None = None,
    faults: Faults | None = None,
    meter_of: Callable[[ApiKey], Meter] = RateLimiter,
    fleet: Fleet | None = None,
    batch_limits: BatchLimits = BatchLimits(),  # noqa: B008  frozen value
) -> FastAPI:
    """``device``: the engine, where it lets adapters be pinned, warmed and unloaded.
    ``resolver`` answers ``auto`` and descriptions; ``generated`` serves /v1/adapters/generate,
    ``learning`` its requests with examples, ``training`` /v1/adapters/train, in ``jobs``;
    ``collectors`` add to /metrics; ``semantic`` explains itself at /v1/route, ``experts`` tells of
    the load of routed adapters; ``encoder`` is a model of its own for vectors; ``pooling`` is how
    the base's embeddings are made, by default the normalised mean; ``tracing`` gets a span of each
    call; ``faults`` is what the other parts report their failures to; ``meter_of`` counts what an
    API key uses of its limits; ``fleet`` knows the other processes of a cluster and their engines.

    ``app.state.parts`` holds the parts, for whoever drains the server.
    """
    names = config.http.served_model_names or (model_name,)
    pools = pools or WorkerPools()
    faults = faults or Faults()
    registry = CollectorRegistry(auto_describe=False)
    server_metrics = ServerMetrics(registry, names[0])
    own = LoraplexCollector(
        engine,
        store,
        server_metrics,
        faults,
        config.engine,
        names[0],
        with_engine=fleet is None,
    )
    registry.register(own)
    ProcessCollector(registry=registry)
    for collector in collectors:
        registry.register(collector)

    # /docs works without the internet: its JavaScript comes from the package.
    app: FastAPI = FastAPIOffline(
        title="Loraplex", version=installed_version("loraplex"), redoc_url=None
    )
    write_exact_bounds(app)
    text = TextPipeline(
        tokenizer, vocab_size=vocab_size, max_model_len=engine.max_model_len, faults=faults
    )
    app.state.parts = AppState(
        engine=engine,
        store=store,
        text=text,
        grammars=Grammars(
            text.backend, vocab_size=text.vocab_size, eos_token_ids=engine.eos_token_ids
        ),
        config=config,
        resolver=AdapterResolver(store, names, pools, resolver),
        unknown_fields=UnknownFields(),
        metrics=server_metrics,
        registry=registry,
        collector=own,
        responses=ResponseStore(config.http.response_store_bytes, config.http.response_ttl_s),
        live=LiveCalls(),
        live_view=LiveView(engine, store, server_metrics, own),
        lifecycle=Lifecycle(engine),
        jobs=jobs or Jobs(pools.jobs, faults),
        batches=BatchRunner(
            app, BatchStore(store.root / "batches", batch_limits), pools.batches, faults
        ),
        pools=pools,
        device=device,
        unloads=DeviceUnloads(device),
        generated=generated,
        learning=learning,
        training=training,
        semantic=semantic,
        experts=experts,
        faults=faults,
        encoder=encoder,
        pooling=pooling or PoolingPlan(PoolingMode.MEAN, normalize=True),
        fleet=fleet,
        model_root=model_name,
        started=int(time()),
    )
    # The middleware checks the keys; this says so in the schema.
    keys = [Depends(HTTPBearer(auto_error=False))] if config.http.api_keys else []
    # routing before adapters: an adapter's name may hold slashes and would swallow the rest.
    behind_keys = (
        files,
        batches,
        generate,
        messages,
        responses,
        vectors,
        models,
        generate_adapter,
        train_adapter,
        routing,
        revisions,
        job_routes,
        activity,
        cluster,
        adapters,
        lora_compat,
        tokens,
        metrics,
    )
    for module in behind_keys:
        app.include_router(module.router, dependencies=keys)
    app.include_router(health.router)
    if config.http.console:
        app.include_router(console.router)
        app.include_router(guide.guide_router())
    _add_error_handlers(app, [health.router, *(module.router for module in behind_keys)])
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, config=config.http)
    app.add_middleware(Auth, config=config.http, meter_of=meter_of)
    app.add_middleware(BrowserGuard, config=config.http)
    if tracing is not None:
        app.add_middleware(Tracing, provider=tracing, model=names[0])
    app.add_middleware(RequestContext, metrics=server_metrics, faults=faults)
    if config.http.cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=config.http.cors_origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=_SHOWN_TO_PAGES,
        )
    return app


def _allowed_methods(scope: Scope, routers: Sequence[APIRouter]) -> str:
    """Of every route with this path; Starlette's own 405 lists those of the first one alone."""
    methods: set[str] = set()
    for router in routers:
        for route in router.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _add_error_handlers(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        info_of(request.scope).failed(error.code)
        return ORJSONResponse.of_error(error, request.scope["path"])

    async def engine_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineError)
        told = from_engine(error)
        info_of(request.scope).failed(told.code)
        return ORJSONResponse.of_error(told, request.scope["path"])

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405 and (allowed := _allowed_methods(request.scope, routers)):
            headers["Allow"] = allowed
        reason = why_not_put(request.method, request.url.path)
        told = ApiError(
            error.status_code,
            f"{request.method} {request.url.path}: {reason or error.detail}",
            code={404: "unknown_url", 405: "method_not_allowed"}.get(
                error.status_code, "invalid_request"
            ),
            headers=headers,
        )
        return ORJSONResponse.of_error(told, request.scope["path"])

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return ORJSONResponse.of_error(problem_of(error.errors()), request.scope["path"])

    async def client_left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # for the log: nobody reads it

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(EngineError, engine_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(ClientLeft, client_left)  # while it was answered
    app.add_exception_handler(ClientDisconnect, client_left)  # while its body was read
