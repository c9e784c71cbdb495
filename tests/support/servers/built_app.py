"""Builds an app from named parts, for tests that need only some of them."""

from typing import Any

from fastapi import FastAPI

from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.learning.jobs import Jobs
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.api.app import build_app
from loraplex_server.api.fleet import Fleet
from loraplex_server.api.parts import (
    AdapterMakers,
    AdapterSelection,
    Limits,
    ServedEngine,
    ServedModel,
    Telemetry,
    Workers,
)
from loraplex_server.settings.config import ServerConfig


def built_app(
    engine: Any,
    store: AdapterStore,
    tokenizer: Any,
    config: ServerConfig,
    *,
    fleet: Fleet | None = None,
    pools: WorkerPools | None = None,
    jobs: Jobs | None = None,
    **parts: Any,
) -> FastAPI:
    """Build an app. ``parts`` are fields of groups in ``api.parts``; ``jobs`` need ``pools``."""

    def group(kind: Any) -> Any:
        names = parts.keys() & kind.__dataclass_fields__.keys()
        return kind(**{name: parts.pop(name) for name in names})

    parts |= {"tokenizer": tokenizer, "client": engine}
    kinds = (ServedModel, ServedEngine, AdapterSelection, AdapterMakers, Telemetry, Limits)
    model, served, selection, makers, telemetry, limits = map(group, kinds)
    assert not parts, f"unknown parts: {sorted(parts)}"
    workers = None
    if pools is not None:
        workers = Workers(pools, jobs or Jobs(pools.jobs))
    return build_app(
        served,
        store,
        model,
        config,
        selection=selection,
        makers=makers,
        workers=workers,
        telemetry=telemetry,
        limits=limits,
        fleet=fleet,
    )
