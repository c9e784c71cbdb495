"""The deployment behind the gateways: one engine in a process of its own."""

import asyncio
import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ray import serve

from loraplex_adapter_store.errors import (
    AdapterRefused,
    CatalogueUnavailable,
    InvalidSelector,
    StoreError,
    UnknownAdapter,
    UnservableAdapter,
)
from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.names.name_syntax import tenant_of
from loraplex_adapter_store.names.selector import NameRef
from loraplex_router.experts.load import ExpertLoad
from loraplex_server.adapters.device_tier import DevicePins, DeviceUnloads
from loraplex_server.adapters.worker_pools import leased
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.defaults import host_tier_bytes
from loraplex_server.engine.errors import (
    AdapterLoadFailed,
    AdapterUnservable,
    EngineDraining,
    EngineError,
)
from loraplex_server.engine.requests.client import EngineStats
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.engine.requests.grammar import CompiledGrammar, GrammarSpec, TokenTrie
from loraplex_server.health_tracker import HealthTracker, kind_of_failure, log_extra, part_of
from loraplex_server.launch import freeze_gc, open_store, temporary_folder
from loraplex_server.logs import set_up_logging
from loraplex_server.metrics.routing_collector import recent_loads
from loraplex_server.model.encoder.loading import encoder_kind
from loraplex_server.model.errors import ModelError
from loraplex_server.model.loading.pull import public_name, resolve_model
from loraplex_server.services import tell
from loraplex_server.settings.config import ServerConfig
from loraplex_server.tenant_shares import TenantThreads

from .autoscaling import ADAPTERS_IN_USE, DEVICE_SLOTS
from .engine_facts import EngineFacts, fingerprint_of, model_of, without_weights
from .remote_request import EventBuffer, RemoteAdapter, RemoteRequest, ReplicaStats

_GAP_S = 0.02  # between two lists of events of a stream
_MAX_GRAMMARS = 128
_MAX_REPORTED = 512  # adapters in host memory, and counts by adapter, in ``stats``
_MAX_COUNTED = 4096  # adapters; beyond that the rarest are forgotten
_log = logging.getLogger(__name__)


class EngineReplica:
    """The Ray deployment of one engine. Ray calls its methods on one event loop.

    Pins, deletions and new contents reach its store through the catalogue.
    """

    async def __init__(self, config: ServerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        """Load the base and start the engine. Raises ModelError, StoreError or ValueError."""
        set_up_logging(config.http)
        self._config, self._model = fingerprint_of(config), model_of(config)
        self._stall_s = config.http.stall_s
        self._adapter_requests: Counter[str] = Counter()  # by digest; "": the base
        self._name = serve.get_replica_context().replica_id.unique_id
        self._closing = contextlib.ExitStack()
        self._loads = TenantThreads("loads", 16, 8)
        self._grammars = TenantThreads("grammars", 4, 2)
        self._compile = functools.lru_cache(maxsize=_MAX_GRAMMARS)(self._compiled)
        await asyncio.to_thread(self._build, config)
        loop, unloads = asyncio.get_running_loop(), DeviceUnloads(self._engine)
        self._store.on_retired(lambda digest: tell(loop, lambda: unloads.retired(digest)))
        self._store.on_pinned(DevicePins(self._engine))
        freeze_gc()

    def facts(self) -> EngineFacts:
        return EngineFacts(
            config=self._config,
            model=self._model,
            base=without_weights(self._base),
            capabilities=self._engine.packer.capabilities,
            eos_token_ids=self._engine.eos_token_ids,
            max_model_len=self._engine.max_model_len,
            max_positions=self._max_positions,
        )

    async def generate(self, start: str, request: RemoteRequest) -> AsyncIterator[list[TokenEvent]]:
        """Yield the events of a request in lists; the very last event has ``finish``.

        Only the router reads ``start``: requests with the same start share a prefix. A failure is
        an event, too. Closing the stream early cancels the request.
        """
        buffer = EventBuffer()
        engine_id = f"{request.request.request_id}/{id(buffer)}"  # a retried request may come twice
        try:
            await self._submit(engine_id, request, buffer)
        except EngineError as error:
            request_id = request.request.request_id
            yield [TokenEvent(request_id, (), finish=FinishReason.ERROR, error=error)]
            return
        try:
            async for events in buffer.lists(_GAP_S):
                yield events
        finally:
            self._engine.cancel(engine_id)  # does nothing after the end

    async def warm(self, adapter: RemoteAdapter) -> None:
        """Load to host memory, and start the load to the device. Raises StoreError."""
        lease = await self._lease(adapter, tenant_of(adapter.name))
        try:
            self._engine.warm(lease)
        finally:
            lease.release()

    async def unload(self, digest: str) -> int:
        """Remove an idle adapter from host memory and the device.

        Returns the freed device bytes, 0 if the adapter is absent or in use.
        """
        if self._store.unload_digest(digest):
            return 0
        return await self._engine.unload(digest)

    def stats(self) -> ReplicaStats:
        engine, held = self._engine.stats(), self._store.stats()
        return ReplicaStats(
            self._name,
            engine,
            alive=self._problem(engine) is None,
            host_adapters=tuple(islice(self._store.cards.plans_in_memory(), _MAX_REPORTED)),
            host_bytes_used=held.host_bytes_used,
            host_bytes_total=held.host_bytes_total,
            expert_loads=recent_loads(self._engine.experts),
            adapter_requests=dict(self._adapter_requests.most_common(_MAX_REPORTED)),
            faults=self._health_tracker.counts,
            degraded=self._health_tracker.degraded,
        )

    def expert_load(self, digest: str, window_s: float) -> ExpertLoad | None:
        """See ``ExpertMonitor.load``."""
        return self._engine.experts.load(digest, window_s)

    def record_routing_stats(self) -> dict[str, object]:
        """Ray's hook: the facts by which ``AdapterRequestRouter`` ranks replicas."""
        stats, plans = self._engine.stats(), self._store.cards.plans_in_memory()
        resident = set(stats.resident_adapters)
        busy = {digest for digest, count in stats.running_adapters.items() if count}
        pending = Counter(stats.running_adapters) + Counter(stats.waiting_adapters)
        return {
            "capacity": stats.max_batch_size,
            "pending": stats.n_running + stats.n_waiting,
            "device": sorted(resident),
            "host": sorted(plans.keys() - resident),
            "free_slots": stats.pool_slots_total - stats.pool_slots_used,
            "evictable": len(resident - busy),
            "free_bytes": stats.pool_bytes_total - stats.pool_bytes_used,
            "bytes": {digest: plan.n_bytes for digest, plan in plans.items()},
            "pending_ranks": sum(
                n * plans[digest].rank for digest, n in pending.items() if digest in plans
            ),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray's hook: the metrics of ``autoscaling.policy``."""
        stats = self._engine.stats()
        in_use = {*stats.running_adapters, *stats.waiting_adapters} - {""}  # "": the base
        return {
            ADAPTERS_IN_USE: float(len(in_use)),
            DEVICE_SLOTS: float(stats.pool_slots_total),
        }

    def check_health(self) -> None:
        """Ray's hook: after three failures the replica is replaced."""
        if (problem := self._problem(self._engine.stats())) is not None:
            raise RuntimeError(problem)

    async def __del__(self) -> None:
        """Ray calls this hook after the last request."""
        self._engine.close()
        self._loads.close()
        self._grammars.close()
        self._closing.close()

    def _problem(self, stats: EngineStats) -> str | None:
        if not self._engine.alive:
            return "the engine thread has stopped"
        if stats.n_running and stats.step_age_s > self._stall_s:
            return f"the engine has not moved for {stats.step_age_s:.0f} s"
        return None

    def _build(self, config: ServerConfig) -> None:
        path = resolve_model(config.model)
        self._health_tracker = HealthTracker()
        self._closing.enter_context(self._health_tracker.listening())
        name = public_name(config.model, path)
        if encoder_kind(path) is not None:
            raise ModelError(f"{name} is an encoder: serve it by `loraplex serve`, each alone")
        built = build_engine(config.engine, path, model_id=name)
        self._engine, self._base = built.engine, built.base_spec
        self._max_positions = built.max_positions
        self._tokenizer_json = built.tokenizer.backend_tokenizer.to_str()
        self._store = self._closing.enter_context(
            open_store(
                config,
                built.base_spec,
                Path(self._closing.enter_context(temporary_folder())),
                host_bytes=config.store.memory_bytes or host_tier_bytes(built.device),
                packer=built.engine.packer,
            )
        )

    async def _submit(self, engine_id: str, request: RemoteRequest, buffer: EventBuffer) -> None:
        """Start the request. Raises EngineError and then holds no lease."""
        if request.base != self._base.fingerprint:  # its tokens mean something else here
            raise EngineDraining("this replica serves another base; send the request elsewhere")
        tenant = request.request.share.tenant.removeprefix("batch:")
        grammar: CompiledGrammar | None = None
        if request.grammar is not None:  # compiled by a gateway before, so compiling ends
            compiled = functools.partial(self._compile, request.grammar)
            grammar = await self._grammars.run(tenant, compiled)
        lease: AdapterLease | None = None
        if request.adapter is not None:
            try:
                lease = await self._lease(request.adapter, tenant)
            except (UnservableAdapter, AdapterRefused, InvalidSelector, UnknownAdapter) as error:
                raise AdapterUnservable(str(error)) from error
            except StoreError as error:
                raise AdapterLoadFailed(str(error)) from error
            except Exception as error:  # the message may contain paths
                _log.exception(
                    "an adapter could not be loaded to host memory", extra=log_extra(error)
                )
                if part_of(error) == "server":
                    raise
                raise AdapterLoadFailed(
                    f"adapter {request.adapter.digest[:12]} could not be loaded to host memory "
                    f"({kind_of_failure(error)}); the log of its engine says more, try again"
                ) from error

        def listen(event: TokenEvent) -> None:
            if event.finish is not None and lease is not None:
                lease.release()
            buffer.put(event)

        try:
            local = replace(request.request, request_id=engine_id, adapter=lease, grammar=grammar)
            self._engine.submit(local, listen)
            self._count(request)
        except EngineError:
            if lease is not None:
                lease.release()
            raise

    def _count(self, request: RemoteRequest) -> None:
        counts = self._adapter_requests
        counts["" if request.adapter is None else request.adapter.digest] += 1
        if len(counts) > _MAX_COUNTED:
            self._adapter_requests = Counter(dict(counts.most_common(_MAX_COUNTED // 2)))

    async def _lease(self, adapter: RemoteAdapter, tenant: str) -> AdapterLease:
        """Lease the adapter, without a thread if it is resident. Raises StoreError."""
        if adapter.combined is None:
            ref = NameRef(adapter.name, adapter.digest)
            resident = self._store.leases.acquire_resident(ref, tenant=tenant)
            if resident is not None:
                return resident
        return await leased(self._loads, tenant, functools.partial(self._acquire, adapter, tenant))

    def _acquire(
        self, adapter: RemoteAdapter, tenant: str, cancelled: threading.Event
    ) -> AdapterLease:
        """Load and lease. Raises StoreError, also if the digest differs from the gateway's."""
        # A content without a known name would leave memory with its last request.
        with contextlib.suppress(CatalogueUnavailable):
            self._store.follow(adapter.names)
        if adapter.combined is None:
            leases = self._store.leases
            return leases.acquire_digest(adapter.name, adapter.digest, cancelled, tenant=tenant)
        lease = self._store.leases.acquire_digests(adapter.combined, adapter.tenant, cancelled)
        if lease.digest != adapter.digest:
            lease.release()
            raise UnservableAdapter(
                f"{adapter.name} has the digest {lease.digest[:12]} here, and "
                f"{adapter.digest[:12]} at the gateway: they run different versions"
            )
        return lease

    def _compiled(self, spec: GrammarSpec) -> CompiledGrammar:
        return self._trie.compile(spec)

    @functools.cached_property
    def _trie(self) -> TokenTrie:
        return TokenTrie(self._tokenizer_json, self._base.vocab_size, self._engine.eos_token_ids)
