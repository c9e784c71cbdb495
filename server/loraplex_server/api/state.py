"""What the routes work with: built once by ``build_app``, passed on, never global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import time
from typing import TypeVar

from prometheus_client import CollectorRegistry
from starlette.requests import Request

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.device_tier import DeviceTier, DeviceUnloads
from loraplex_server.adapters.jobs import Jobs
from loraplex_server.adapters.resolver import AdapterResolver
from loraplex_server.api.protocol.body_parser import BodyParser
from loraplex_server.api.serving.generation import LiveGenerations
from loraplex_server.api.serving.text_pipeline import TextPipeline
from loraplex_server.api_keys import EVERY_ADAPTER, AdapterAccess
from loraplex_server.engine.client import EngineClient
from loraplex_server.metrics.collector import LoraplexCollector
from loraplex_server.metrics.server_metrics import ServerMetrics
from loraplex_server.settings import ServerConfig

from .errors import from_store
from .lifecycle import Lifecycle

__all__ = ["AppState", "in_store_thread", "state_of"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AppState:
    engine: EngineClient
    store: AdapterStore
    text: TextPipeline
    config: ServerConfig
    resolver: AdapterResolver
    parser: BodyParser
    metrics: ServerMetrics
    registry: CollectorRegistry
    collector: LoraplexCollector
    live: LiveGenerations
    lifecycle: Lifecycle
    jobs: Jobs
    executor: Executor  # for the store's blocking calls
    device: DeviceTier | None  # None: the engine does not tell
    unloads: DeviceUnloads
    model_root: str  # opaque name of the base's weights: a model id, never a path
    started: int = 0  # seconds since the epoch

    def now(self) -> int:
        return int(time())


def state_of(request: Request) -> AppState:
    services = request.app.state.services
    assert isinstance(services, AppState)
    return services


async def in_store_thread(
    services: AppState, work: Callable[[], T], access: AdapterAccess = EVERY_ADAPTER
) -> T:
    """Runs a blocking call of the store off the event loop. Raises ApiError."""
    try:
        return await asyncio.get_running_loop().run_in_executor(services.executor, work)
    except StoreError as error:
        raise from_store(error, param="name", access=access) from error
