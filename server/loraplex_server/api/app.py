"""Builds the ASGI application from its parts. There are no globals."""

from importlib.metadata import version as installed_version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.fine_tuning.answer_scores import AnswerScorer
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.settings.api_keys import EVERY_ADAPTER, AdapterAccess
from loraplex_server.settings.config import HttpConfig, ServerConfig

from .batches.batch_store import BatchStore
from .batches.runner import BatchRunner
from .compat import sglang, tgi, tinker
from .error_handlers import add_error_handlers
from .fine_tuning.runner import FineTuning, TunedBase
from .fine_tuning.tuning_store import TuningStore
from .fleet import Fleet
from .middleware.auth import Auth
from .middleware.body_limit import BodyLimit
from .middleware.browser_guard import BrowserGuard, Cors
from .middleware.request_context import RequestContext
from .middleware.tracing import Tracing
from .parts import (
    AdapterMakers,
    AdapterSelection,
    Limits,
    ServedEngine,
    ServedModel,
    Telemetry,
    Workers,
)
from .request_info import BatchCaller
from .routes import (
    activity,
    adapters,
    batches,
    files,
    fine_tuning,
    generate,
    health,
    jobs,
    lora_compat,
    make_adapters,
    metrics,
    models,
    pages,
    revisions,
    routing,
    tokens,
    vectors,
)
from .state import AppState

# Routes that need an API key. ``routing`` stands before ``adapters``, whose names hold slashes
# and would match the rest of the path.
_KEYED = (
    *(files, batches, fine_tuning, generate, vectors, models, make_adapters, routing, revisions),
    *(jobs, activity, adapters, lora_compat, tokens, metrics, tinker, tgi, sglang),
)
_TOPICS = (  # the order of the groups of /docs
    *("Chats and texts", "Vectors, classes and scores", "Models", "Adapters", "Training"),
    *("Files and batches", "Routes of other servers", "Watching"),
)
_EXPOSED_HEADERS = (
    *("etag", "location", "retry-after", "retry-after-ms", "x-loraplex-adapter", "x-request-id"),
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)


def build_app(
    engine: ServedEngine,
    store: AdapterStore,
    model: ServedModel,
    config: ServerConfig,
    *,
    selection: AdapterSelection = AdapterSelection(),  # noqa: B008  frozen values, as below
    makers: AdapterMakers = AdapterMakers(),  # noqa: B008
    workers: Workers | None = None,
    telemetry: Telemetry | None = None,
    limits: Limits = Limits(),  # noqa: B008
    fleet: Fleet | None = None,
) -> FastAPI:
    """Build the application. ``fleet`` has the other processes of a cluster, if there are any.

    ``app.state.parts`` is the AppState, for the code that starts and drains the server.
    """
    telemetry = telemetry or Telemetry()
    workers = workers or Workers.start()
    # /docs works without the internet: the package brings its JavaScript.
    # A redirect to a path without a slash at its end would be built from the Host header.
    app: FastAPI = FastAPIOffline(
        title="Loraplex",
        version=installed_version("loraplex"),
        openapi_tags=[{"name": topic} for topic in _TOPICS],
        redoc_url=None,
        redirect_slashes=False,
    )
    _complete_schema(app, has_keys=bool(config.http.api_keys))
    app.state.parts = state = AppState(
        engine,
        store,
        model,
        config,
        selection=selection,
        makers=makers,
        workers=workers,
        telemetry=telemetry,
        fleet=fleet,
    )
    batch_store = BatchStore(store.root / "batches", limits.batches)
    tuning_store = TuningStore(store.root / "fine-tuning", batch_store)
    counts = batch_store.n_bytes, tuning_store.n_bytes, state.checkpoints.n_bytes
    store.count_bytes_of(lambda tenant: sum(n_bytes(tenant) for n_bytes in counts))
    state.batches = BatchRunner(app, batch_store, state.pools.batches, state.pools.lines)
    if makers.training_thread is not None and config.learning.allow_training:
        state.fine_tuning = _fine_tuning(state, tuning_store, makers.training_thread)
    _add_routes(app, config.http)
    _add_middleware(app, state, telemetry, limits)
    return app


def _fine_tuning(state: AppState, store: TuningStore, trainer: TrainingThread) -> FineTuning:
    base = TunedBase(
        state.resolver.base_name,
        state.model.tokenizer,
        state.engine.max_model_len,
    )
    keys = state.config.http.api_keys

    def access_of(caller: BatchCaller) -> AdapterAccess | None:
        if not keys and not caller.key_id:
            return EVERY_ADAPTER
        known = {(key.id, key.tenant): key.access for key in keys}
        return known.get((caller.key_id, caller.tenant))

    return FineTuning(
        store,
        state.store,
        state.jobs,
        trainer,
        base,
        thread=state.pools.batches,
        workers=state.pools.jobs,
        scorer=AnswerScorer(
            state.engine, state.store, base.tokenizer, state.pools.jobs, base_name=base.name
        ),
        access_of=access_of,
    )


def _add_routes(app: FastAPI, config: HttpConfig) -> None:
    """Add the routes of all modules as they are.

    ``include_router`` would analyse every route again, within the first request.
    """
    routers = [*(module.router for module in _KEYED), health.router]
    shown = [pages.console_router, pages.guide_router()] if config.console else []
    for router in (*routers, *shown):
        app.router.routes.extend(router.routes)
    add_error_handlers(app, routers)


def _add_middleware(app: FastAPI, state: AppState, telemetry: Telemetry, limits: Limits) -> None:
    """The middleware that is added last is the outermost."""
    config, model = state.config.http, state.resolver.base_name
    app.add_middleware(BodyLimit, config=config)
    app.add_middleware(Auth, config=config, meter_of=limits.meter_of)
    app.add_middleware(BrowserGuard, config=config)
    if telemetry.tracing is not None:
        app.add_middleware(Tracing, provider=telemetry.tracing, model=model)
    app.add_middleware(RequestContext, metrics=state.metrics)
    if config.cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
        )


def _complete_schema(app: FastAPI, *, has_keys: bool) -> None:
    """Write exact integer bounds into /openapi.json, and which routes need a key.

    FastAPI stores bounds as floats: 2^63 would become 9.223372036854776e+18, which is larger.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _exact(original())
            if has_keys:
                _document_keys(app.openapi_schema)
        schema = app.openapi_schema
        assert schema is not None
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation does


def _document_keys(schema: dict[str, Any]) -> None:
    """Add the bearer token, which the middleware checks, to the schema of each keyed route."""
    schema["components"]["securitySchemes"] = {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    for module in _KEYED:
        for route in module.router.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                for method in route.methods or ():
                    operation = schema["paths"][route.path_format][method.lower()]
                    operation["security"] = [{"HTTPBearer": []}]


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
