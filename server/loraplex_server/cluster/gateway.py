"""The HTTP application in a process without an engine: the deployments ``Gateway`` and ``Desk``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import ClassVar

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message
from transformers import AutoTokenizer

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.content_loader import PlanCheck
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest
from loraplex_server.adapters.learning import Learner, Learnt
from loraplex_server.api.middleware.rate_limit import Meter, RateLimiter
from loraplex_server.api.state import in_store_thread
from loraplex_server.api_keys import AdapterAccess, ApiKey
from loraplex_server.engine.build import dtype_of
from loraplex_server.faults import Faults
from loraplex_server.front import (
    ServedBase,
    build_front,
    parts_of,
    public_name,
    start_services,
    stop_services,
)
from loraplex_server.launch import freeze_gc
from loraplex_server.logs import set_up_logging
from loraplex_server.model.pull import resolve_model
from loraplex_server.settings import ServerConfig

from .base_weights import with_weights_of
from .cluster_fleet import ClusterFleet
from .desk import PassedOn, answered_by, to_desk
from .desk_learner import DeskLearner, learnt_by
from .engine_facts import EngineFacts, facts_of_model, own_facts
from .fleet_metrics import ProcessMetrics
from .front_calls import FrontCalls, FrontSpeed, Role
from .key_limits import SharedMeter
from .refused import Refused
from .remote_engine import RemoteEngine
from .request_id import without_request_id
from .shared_store import open_shared_store

__all__ = ["Desk", "Gateway"]

_HOST_BYTES = 512 << 20  # plans are looked at here, and used elsewhere
_LONG_S = 3600.0  # a job's id would be known to one gateway alone: changes are waited for


class Desk:
    """Keys, templates, tokens, and name → digest once. Ray calls it on one event loop.

    As the deployment ``Desk`` it keeps what one process has to keep, and answers for gateways.
    """

    registers: ClassVar[bool] = True  # the adapters that the config names
    role: ClassVar[Role] = "desk"
    learner: Learner | None = None  # this process

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        config: ServerConfig,
        engines: DeploymentHandle,
        limits: DeploymentHandle | None,
    ) -> None:
        """Waits for an engine replica; see ``find_facts``.

        ``limits``: where keys are counted; None: none is limited.
        Raises StoreError, ModelError, ValueError or OSError.
        """
        set_up_logging(config.http)
        self.name = serve.get_replica_context().replica_id.unique_id
        self._config = config
        self._limits = limits
        self._closing = contextlib.ExitStack()
        everybody = serve.get_deployment_handle(engines.deployment_name, engines.app_name)
        facts = await self.find_facts(engines, everybody)
        self._engine = RemoteEngine(engines, everybody, facts)
        self._fleet = ClusterFleet(self.name, self._engine)
        self.front = await asyncio.to_thread(self._build, facts)
        self._services = parts_of(self.front)
        self._watching = await start_services(self._services)
        freeze_gc()

    async def answer(self, request: PassedOn) -> AsyncGenerator[list[Message]]:
        """A request that a gateway passes on; see ``desk.answered_by``."""
        async with contextlib.aclosing(answered_by(self.front, request)) as lists:
            async for messages in lists:
                yield messages

    async def learn(
        self,
        request: AdapterGenerationRequest,
        access: AdapterAccess,
        wait: bool,
        needs_adapter: bool = True,
    ) -> Learnt | Refused:
        """Examples that a gateway's request has brought; see ``Learner``.

        A gateway of an earlier version, which is drained in an upgrade, always needs an adapter.
        """
        learning = self._services.learning
        assert learning is not None  # the gateways have the same config
        return await learnt_by(learning, request, access, wait=wait, needs_adapter=needs_adapter)

    async def own_metrics(self) -> ProcessMetrics:
        """What this process counted."""
        await in_store_thread(self._services, self._services.collector.refresh_listing)
        return ProcessMetrics(self.name, list(self._services.registry.collect()))

    async def own_calls(self, tenant: str | None, n_ended: int) -> FrontCalls:
        """Those that this process answers; see ``FrontCalls.of``."""
        return FrontCalls.of(self.name, self.role, self._services.metrics.calls, tenant, n_ended)

    async def own_speed(self) -> FrontSpeed:
        """How fast this process answers now."""
        return FrontSpeed.of(self._services)

    async def unload(self, digest: str) -> int:
        """Takes an idle content out of this process; returns how many requests keep it here."""
        return self._services.store.unload_digest(digest)

    async def check_health(self) -> None:
        """Ray's hook: after three failures the process is replaced."""
        if not self._engine.alive:
            raise RuntimeError("the client of the engine replicas has stopped")

    async def __del__(self) -> None:
        """Ray's hook, after the last request."""
        if hasattr(self, "_services"):
            await stop_services(self._services, 0.0)
            self._watching.cancel()
            await self._services.text.close()
            await self._engine.close()
            self._services.pools.close()
        await asyncio.to_thread(self._closing.close)

    async def find_facts(
        self, engines: DeploymentHandle, everybody: DeploymentHandle
    ) -> EngineFacts:
        """An upgrade has ended the Desk before this one: engines that may never start can wait."""
        return await facts_of_model(engines, everybody, self._config)

    def open_store(self, base: BaseSpec, check: PlanCheck, faults: Faults) -> AdapterStore:
        """In a folder that stays: files and batches are in it."""
        root = self._config.store.root
        assert root is not None  # ``ClusterConfig`` has one always
        return self._store_in(root / "desk" / base.fingerprint[:16], base, check, faults)

    def _build(self, facts: EngineFacts) -> FastAPI:
        path = resolve_model(self._config.model)
        faults = Faults()
        spec = with_weights_of(facts.base, path, dtype_of(self._config.engine.dtype))
        store = self.open_store(spec, facts.capabilities.check, faults)
        base = ServedBase(
            engine=self._engine,
            tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True),
            spec=spec,
            name=public_name(self._config.model, path),
            path=path,
            experts=None,
            weights=None,
        )
        return build_front(
            self._config,
            base,
            store,
            faults,
            self._closing,
            registers=self.registers,
            meter_of=self._meter_of,
            fleet=self._fleet,
            learner=self.learner,
        )

    def _store_in(
        self, folder: Path | None, base: BaseSpec, check: PlanCheck, faults: Faults
    ) -> AdapterStore:
        store, close = open_shared_store(
            self._config,
            base,
            faults,
            folder,
            host_bytes=self._config.store.memory_bytes or _HOST_BYTES,
            check=check,
        )
        self._closing.callback(close)
        return store

    def _meter_of(self, key: ApiKey) -> Meter:
        return RateLimiter(key) if self._limits is None else SharedMeter(key, self._limits)


@serve.ingress()
class Gateway(Desk):
    """Reached by clients. Any number of them; none has anything that is not elsewhere, too."""

    registers = False
    role = "gateway"

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        config: ServerConfig,
        engines: DeploymentHandle,
        limits: DeploymentHandle | None,
        desk: DeploymentHandle,
    ) -> None:
        self._desk = desk
        if config.learning.threads > 0:
            self.learner = DeskLearner(desk)
        await desk.options(method_name="check_health").remote()  # adapters are registered by then
        waits = config.http.model_copy(update={"job_wait_s": _LONG_S})
        await Desk.__init__(self, config.model_copy(update={"http": waits}), engines, limits)

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Ray's hook, after the constructor
        passing = to_desk(self.front, self._desk, self._config.http, self._meter_of)
        return without_request_id(passing)

    async def find_facts(
        self, engines: DeploymentHandle, everybody: DeploymentHandle
    ) -> EngineFacts:
        """Of this version: gateways before it serve until it is ready."""
        return await own_facts(engines, everybody, self._config)

    def open_store(self, base: BaseSpec, check: PlanCheck, faults: Faults) -> AdapterStore:
        """In a folder of its own, which goes with it."""
        return self._store_in(None, base, check, faults)
