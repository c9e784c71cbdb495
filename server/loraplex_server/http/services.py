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
from loraplex_server.api_keys import EVERY_ADAPTER, AdapterAccess
from loraplex_server.config import ServerConfig
from loraplex_server.engine.client import EngineClient

from .adapter_choice import AdapterChooser
from .body_parser import BodyParser
from .device_tier import DeviceTier, DeviceUnloads
from .errors import from_store
from .generation import LiveGenerations
from .jobs import Jobs
from .lifecycle import Lifecycle
from .metrics.collector import LoraplexCollector
from .metrics.server_metrics import ServerMetrics
from .text_pipeline import TextPipeline

__all__ = ["Services", "in_store_thread", "services_of"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    engine: EngineClient
    store: AdapterStore
    text: TextPipeline
    config: ServerConfig
    chooser: AdapterChooser
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


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def in_store_thread(
    services: Services, work: Callable[[], T], access: AdapterAccess = EVERY_ADAPTER
) -> T:
    """Runs a blocking call of the store off the event loop. Raises ApiError."""
    try:
        return await asyncio.get_running_loop().run_in_executor(services.executor, work)
    except StoreError as error:
        raise from_store(error, param="name", access=access) from error
