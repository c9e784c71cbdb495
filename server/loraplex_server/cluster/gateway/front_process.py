"""The HTTP application in a process without an engine, from its start to its end."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from loraplex_server.adapters.learning.learning import Learner
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.api.state import AppState, in_store_thread
from loraplex_server.cluster.replica.engine_facts import find_facts, with_weights_of
from loraplex_server.engine.build import dtype_of
from loraplex_server.front import build_front
from loraplex_server.health_tracker import HealthTracker
from loraplex_server.launch import freeze_gc, open_store, temporary_folder
from loraplex_server.logs import set_up_logging
from loraplex_server.model.loading.pull import public_name, resolve_model
from loraplex_server.served_base import ServedBase
from loraplex_server.services import parts_of, start_services, stop_services
from loraplex_server.settings.api_keys import ApiKey
from loraplex_server.settings.config import ServerConfig

from .cluster_fleet import ClusterFleet, FrontReport, ProcessMetrics, Role
from .remote_engine import RemoteEngine

_HOST_BYTES = 512 << 20  # plans are only inspected here; engines use them


class FrontProcess:
    """The application, its services and its client of the engines. Event loop only."""

    _closing: contextlib.ExitStack | None = None
    _services: AppState | None = None

    async def start(
        self,
        config: ServerConfig,
        engines: DeploymentHandle,
        role: Role,
        meter_of: Callable[[ApiKey], Meter],
        *,
        learner: Learner | None = None,
        folder: Path | None = None,
    ) -> None:
        """Wait for an engine replica, build the application and start its services.

        ``learner`` None: this process learns. ``folder``: of the store, with files and batches;
        None: a temporary one. Raises StoreError, ModelError, ValueError or OSError.
        """
        self._role: Role = role
        self._name = serve.get_replica_context().replica_id.unique_id
        self._closing = contextlib.ExitStack()
        set_up_logging(config.http)
        everybody = serve.get_deployment_handle(engines.deployment_name, engines.app_name)
        # An upgrade ends the old coordinator first, so the new one takes any engine that serves.
        is_coordinator = role == "coordinator"
        facts = await find_facts(engines, everybody, config, any_version=is_coordinator)
        self._engine = RemoteEngine(engines, everybody, facts)

        def build(closing: contextlib.ExitStack) -> FastAPI:
            path = resolve_model(config.model)
            health_tracker = HealthTracker()
            closing.enter_context(health_tracker.listening())
            spec = with_weights_of(facts.base, path, dtype_of(config.engine.dtype))
            if folder is None:
                root = Path(closing.enter_context(temporary_folder()))
            else:
                root = folder / spec.fingerprint[:16]
            host_bytes = config.store.memory_bytes or _HOST_BYTES
            store = closing.enter_context(
                open_store(
                    config, spec, root, host_bytes=host_bytes, check=facts.capabilities.check
                )
            )
            base = ServedBase(
                engine=self._engine,
                tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True),
                spec=spec,
                name=public_name(config.model, path),
                path=path,
                experts=None,
                weights=None,
            )
            return build_front(
                config,
                base,
                store,
                health_tracker,
                closing,
                registers=is_coordinator,
                meter_of=meter_of,
                fleet=ClusterFleet(self._name, self._engine),
                learner=learner,
            )

        self.front = await asyncio.to_thread(build, self._closing)
        self._services = parts_of(self.front)
        self._watching = await start_services(self._services)
        freeze_gc()

    @property
    def services(self) -> AppState:
        assert self._services is not None
        return self._services

    async def metrics(self) -> ProcessMetrics:
        await in_store_thread(self.services, self.services.collector.refresh_listing)
        return ProcessMetrics(self._name, list(self.services.registry.collect()))

    async def report(self, tenant: str | None, n_ended: int) -> FrontReport:
        return FrontReport.of(self._name, self._role, self.services, tenant, n_ended)

    async def unload(self, digest: str) -> int:
        """Evict an idle content from host memory. Returns the number of uses that keep it."""
        return self.services.store.unload_digest(digest)

    async def check_health(self) -> None:
        """Ray calls this hook, and replaces the process after three failures."""
        if not self._engine.alive:
            raise RuntimeError("the client of the engine replicas has stopped")

    async def __del__(self) -> None:
        """Ray calls this hook after the last request, and after a failed start."""
        if self._services is not None:
            await stop_services(self._services, 0.0)
            self._watching.cancel()
            await self._services.text.close()
            await self._engine.close()
            self._services.pools.close()
        if self._closing is not None:
            await asyncio.to_thread(self._closing.close)
