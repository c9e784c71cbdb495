"""One engine in a process of its own: the deployment behind the gateways."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from ray import serve

from loraplex_adapter_store.errors import (
    AdapterRefused,
    CatalogueUnavailable,
    InvalidSelector,
    StoreError,
    UnknownAdapter,
    UnservableAdapter,
)
from loraplex_adapter_store.lease import AdapterLease
from loraplex_adapter_store.names import tenant_of
from loraplex_adapter_store.selector import NameRef
from loraplex_router.experts import ExpertLoad
from loraplex_server.adapters.device_pins import DevicePins
from loraplex_server.adapters.device_tier import DeviceUnloads
from loraplex_server.adapters.worker_pools import TenantShares
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.client import EngineStats
from loraplex_server.engine.defaults import host_tier_bytes
from loraplex_server.engine.errors import (
    AdapterLoadFailed,
    AdapterUnservable,
    EngineDraining,
    EngineError,
)
from loraplex_server.engine.events import FinishReason, TokenEvent
from loraplex_server.engine.grammar import CompiledGrammar, GrammarSpec, TokenTrie
from loraplex_server.faults import Faults, kind_of_fault, part_of
from loraplex_server.front import public_name, tell
from loraplex_server.launch import freeze_gc
from loraplex_server.logs import set_up_logging
from loraplex_server.metrics.routing_collector import recent_loads
from loraplex_server.model.pull import resolve_model
from loraplex_server.settings import ServerConfig

from .autoscaling import ADAPTERS_IN_USE, DEVICE_SLOTS
from .base_weights import without_weights
from .engine_facts import EngineFacts, fingerprint_of, model_of
from .event_buffer import EventBuffer
from .remote_request import RemoteAdapter, RemoteRequest, ReplicaStats
from .shared_store import open_shared_store

__all__ = ["EngineReplica"]

_GAP_S = 0.02  # between two lists of events of a stream
_MAX_GRAMMARS = 128
_MAX_TOLD = 512  # adapters of the host tier, and of the counts by adapter
_MAX_COUNTED = 4096  # beyond that the rarest are forgotten
_log = logging.getLogger(__name__)


class EngineReplica:
    """Ray calls it on one event loop. Methods that gateways call take and give frozen values.

    Its store is one of the fleet's: pins, deletions and new contents come with the catalogue.
    """

    async def __init__(self, config: ServerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        """Loads the base and starts the engine.

        Raises ModelError, StoreError, ValueError or OSError.
        """
        set_up_logging(config.http)
        self._config, self._model = fingerprint_of(config), model_of(config)
        self._stall_s = config.http.stall_s
        self._adapter_requests: Counter[str] = Counter()  # taken in, by digest; "": the base
        self._name = serve.get_replica_context().replica_id.unique_id
        self._loads = TenantShares(ThreadPoolExecutor(16, thread_name_prefix="loraplex-loads"), 8)
        grammars = ThreadPoolExecutor(4, thread_name_prefix="loraplex-grammars")
        self._grammars = TenantShares(grammars, 2)
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
        """The events of a request, in lists; the last event of the last list has ``finish``.

        ``start`` is read by the router alone: requests with the same one share a prefix. A failure
        is an event, too. Closing the stream early cancels the request.
        """
        buffer = EventBuffer()
        engine_id = f"{request.request_id}/{id(buffer)}"  # one that is tried again may come twice
        try:
            await self._submit(engine_id, request, buffer)
        except EngineError as error:
            yield [TokenEvent(request.request_id, (), finish=FinishReason.ERROR, error=error)]
            return
        try:
            async for events in buffer.lists(_GAP_S):
                yield events
        finally:
            self._engine.cancel(engine_id)  # nothing happens where it has ended

    async def warm(self, adapter: RemoteAdapter) -> None:
        """Loads to host memory, and starts the load to the device. Raises StoreError."""
        lease = await self._lease(adapter, tenant_of(adapter.name))
        try:
            self._engine.warm(lease)
        finally:
            lease.release()

    async def unload(self, digest: str) -> int:
        """Takes an idle adapter out of host memory and off the device.

        Returns the bytes of the device, 0 if it is absent or in use.
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
            host_adapters=tuple(islice(self._store.plans_in_memory(), _MAX_TOLD)),
            host_bytes_used=held.host_bytes_used,
            host_bytes_total=held.host_bytes_total,
            expert_loads=recent_loads(self._engine.experts),
            adapter_requests=dict(self._adapter_requests.most_common(_MAX_TOLD)),
            faults=self._faults.counts,
            degraded=self._faults.degraded,
        )

    def expert_load(self, digest: str, window_s: float) -> ExpertLoad | None:
        """See ``ExpertMonitor.load``."""
        return self._engine.experts.load(digest, window_s)

    def record_routing_stats(self) -> dict[str, object]:
        """Ray's hook: what ``AdapterRequestRouter`` ranks replicas by."""
        stats, plans = self._engine.stats(), self._store.plans_in_memory()
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
        """Ray's hook: what ``autoscaling.policy`` decides by."""
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
        """Ray's hook, after the last request."""
        self._engine.close()
        self._loads.close()
        self._grammars.close()
        self._close_store()

    def _problem(self, stats: EngineStats) -> str | None:
        if not self._engine.alive:
            return "the engine thread has stopped"
        if stats.n_running and stats.step_age_s > self._stall_s:
            return f"the engine has not moved for {stats.step_age_s:.0f} s"
        return None

    def _build(self, config: ServerConfig) -> None:
        path = resolve_model(config.model)
        self._faults = faults = Faults()
        name = public_name(config.model, path)
        built = build_engine(config.engine, path, model_id=name, faults=faults)
        self._engine, self._base = built.engine, built.base_spec
        self._max_positions = built.max_positions
        self._tokenizer_json = built.tokenizer.backend_tokenizer.to_str()
        self._store, self._close_store = open_shared_store(
            config,
            built.base_spec,
            faults,
            host_bytes=config.store.memory_bytes or host_tier_bytes(built.device),
            packer=built.engine.packer,
        )

    async def _submit(self, engine_id: str, request: RemoteRequest, buffer: EventBuffer) -> None:
        """Raises EngineError, and then nothing is held."""
        if request.base != self._base.fingerprint:  # its tokens mean something else here
            raise EngineDraining("this replica serves another base; send the request elsewhere")
        tenant = request.share.tenant.removeprefix("batch:")
        grammar: CompiledGrammar | None = None
        if request.grammar is not None:  # a gateway has tried it, so compiling ends
            compiled = functools.partial(self._compile, request.grammar)
            grammar = await (await self._grammars.run(tenant, compiled))
        lease: AdapterLease | None = None
        if request.adapter is not None:
            try:
                lease = await self._lease(request.adapter, tenant)
            except (UnservableAdapter, AdapterRefused, InvalidSelector, UnknownAdapter) as error:
                raise AdapterUnservable(str(error)) from error
            except StoreError as error:
                raise AdapterLoadFailed(str(error)) from error
            except Exception as error:  # its message may hold paths
                self._faults.unforeseen(error)
                if part_of(error) == "server":
                    raise
                _log.exception("an adapter could not be loaded to host memory")
                raise AdapterLoadFailed(
                    f"adapter {request.adapter.digest[:12]} could not be loaded to host memory "
                    f"({kind_of_fault(error)}); the log of its engine says more, try again"
                ) from error

        def listen(event: TokenEvent) -> None:
            if event.finish is not None and lease is not None:
                lease.release()
            buffer.put(event)

        try:
            self._engine.submit(request.local(engine_id, lease, grammar), listen)
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
        """Raises StoreError. What is in memory waits for no thread."""
        if adapter.combined is None and self._store.is_fresh(adapter.name):
            resident = self._store.acquire_resident(NameRef(adapter.name, adapter.digest))
            if resident is not None:
                return resident
        return await self._loads.lease(tenant, functools.partial(self._acquire, adapter))

    def _acquire(self, adapter: RemoteAdapter, cancelled: threading.Event) -> AdapterLease:
        """Raises StoreError, also if the plan is not the one that the gateway means."""
        # A content whose name is not known here leaves memory with its last request.
        with contextlib.suppress(CatalogueUnavailable):
            self._store.follow(adapter.names)
        if adapter.combined is None:
            return self._store.acquire_digest(adapter.name, adapter.digest, cancelled)
        lease = self._store.acquire_digests(adapter.combined, cancelled, tenant=adapter.tenant)
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
