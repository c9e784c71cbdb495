"""The adapters on the device, loaded and evicted without stalling steps.

    absent ──load──▶ loading ──(loader thread copies)──▶ resident ──evict──▶ absent
                        └──────────(it failed)─────────────────────────────▶ absent

The engine thread reserves memory and publishes tables, which is quick; the loader thread copies.
Requests hold their adapter while they run. A held adapter is never evicted.
"""

import logging
import time
from collections.abc import Callable, Collection
from enum import Enum

from loraplex_adapter_store.errors import AdapterRefused
from loraplex_adapter_store.part_log import worked
from loraplex_adapter_store.plan import AdapterPlan, PrefixPlan
from loraplex_kernels.cpu.exponent_coding import prefers_coded_pages
from loraplex_kernels.errors import PoolFull
from loraplex_server.engine.errors import (
    AdapterLoadFailed,
    AdapterUnservable,
    EngineError,
    NoAdapterSlot,
)
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.trunk import Trunk

from .adapter_loader import AdapterLoader, OtherPools
from .adapter_memory import AdapterMemory, new_pool
from .adapter_packer import AdapterPacker, PackedAdapter
from .capabilities import EngineCapabilities
from .device_parts import DeviceParts
from .gate_tables import GateTables
from .layer_kind import LayerKind, kind_of
from .resident_adapter import ResidentAdapter

_log = logging.getLogger(__name__)


class Residency(Enum):
    RESIDENT = "resident"
    LOADING = "loading"
    FULL = "full"  # until a running request ends


class DevicePool:
    """Owner of the adapters' device memory and its recency. Engine thread only."""

    def __init__(
        self,
        model: Trunk,
        limits: PoolLimits,
        *,
        on_loaded: Callable[[], object],
        others: OtherPools = OtherPools(),  # noqa: B008  stateless
        exponent_coding: bool | None = None,  # of ``LoraPool``; None: where it makes steps faster
        captures_steps: bool = False,  # captured layers read ``gate_tables``
    ) -> None:
        """``on_loaded`` is called after each load, on any thread. It must only wake the engine."""
        if exponent_coding is None:  # shards must have equal sizes on all ranks
            coded = prefers_coded_pages(model.dtype, model.device)
            exponent_coding = model.shard is None and coded
        self.pool = new_pool(model, limits, exponent_coding=exponent_coding)
        self.n_loads = 0
        self.n_evictions = 0
        self.load_seconds = 0.0  # sum over all loads
        # By digest, of resident adapters. Replaced as a whole, since other threads read them.
        self.resident_bytes: dict[str, int] = {}
        self.resident_load_s: dict[str, float] = {}
        capabilities = EngineCapabilities.of_model(model, max_rank=limits.max_rank)
        layout = None if model.shard is None else model.shard.layout
        self.packer = AdapterPacker(model.groups, self.pool, capabilities, layout)
        self.gate_tables = GateTables(self.pool, model.mlps) if captures_steps else None
        others.open(limits)
        self._others = others
        self._loader = AdapterLoader(model, others)
        self._on_loaded = on_loaded
        self._output_head = capabilities.output_head
        self._outside_layers = {capabilities.input_embedding, capabilities.output_head}
        self._projections = capabilities.linears
        self._residents: dict[str, ResidentAdapter] = {}
        self._arriving: list[ResidentAdapter] = []  # not published yet
        self._failed: list[ResidentAdapter] = []  # in this step
        self._pins: set[str] = set()

    def ensure_resident(self, plan: AdapterPlan, *, spared: Collection[str] = ()) -> Residency:
        """Starts to load an adapter that a request needs, unless it is resident or loading.

        Evicts idle adapters for it, except those in ``spared``. Raises AdapterUnservable if it can
        never fit, and NoAdapterSlot if only unpinning other adapters would make room. Raises
        AdapterLoadFailed if its load failed; the next call tries again.
        """
        resident = self._residents.get(plan.digest)
        if resident is None:
            resident = self._start_load(plan, requested=True, spared=spared)
        if resident is None:
            return Residency.FULL
        resident.is_requested = True
        if not resident.load.done():
            return Residency.LOADING
        self._settle_arrived()
        if resident.error is not None:
            self._forget(resident)
            raise _load_failed(plan.digest) from resident.error
        resident.last_used = time.monotonic()
        return Residency.RESIDENT

    def warm(self, plan: AdapterPlan) -> None:
        """Starts a load without a request. Errors are logged."""
        if plan.digest in self._residents:
            return
        try:
            self._start_load(plan, requested=False)
        except EngineError as error:
            _log.warning("adapter %s cannot be warmed: %s", plan.digest[:12], error)

    def publish_arrived(self) -> None:
        """Lets kernels read the adapters whose loads are done. Called once a step.

        Also forgets loads that failed in an earlier step, which every waiting request has seen.
        """
        for failed in self._failed:
            if self._residents.get(failed.digest) is failed:
                self._forget(failed)
        self._failed.clear()
        self._settle_arrived()

    def hold(self, digest: str) -> None:
        """Protects a resident adapter from eviction, once for each running request."""
        resident = self._residents[digest]
        if not resident.is_published:  # the base would answer
            raise RuntimeError(f"adapter {digest[:12]} is held before it is resident")
        resident.holders += 1

    def release(self, digest: str) -> None:
        """Ends a ``hold``."""
        resident = self._residents[digest]
        if resident.holders <= 0:
            raise RuntimeError(f"adapter {digest[:12]} released more often than held")
        resident.holders -= 1
        resident.last_used = time.monotonic()

    def resident(self, digest: str) -> ResidentAdapter:
        """Return a held adapter."""
        return self._residents[digest]

    def prefix(self, digest: str) -> PrefixPlan | None:
        """Return the prefix of a held adapter, on the device."""
        return self._residents[digest].memory.parts.prefix

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Pins or unpins an adapter. A pinned adapter is not evicted once it is resident."""
        (self._pins.add if pinned else self._pins.discard)(digest)

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    def is_loading(self, digest: str) -> bool:
        resident = self._residents.get(digest)
        return resident is not None and not resident.load.done()

    def drop(self, digest: str) -> int:
        """Frees an idle adapter's memory and returns the bytes; 0 if it is absent or held."""
        resident = self._residents.get(digest)
        if resident is None or resident.holders or not resident.load.done():
            return 0
        return self._forget(resident)

    @property
    def residents(self) -> tuple[ResidentAdapter, ...]:
        """The published adapters."""
        return tuple(r for r in self._residents.values() if r.is_published)

    def close(self) -> None:
        self._loader.close()

    def _settle_arrived(self) -> None:
        """Publishes the adapters whose loads are done, or notes their errors."""
        if not self._arriving:
            return
        arrived: list[ResidentAdapter] = []
        loading: list[ResidentAdapter] = []
        for resident in self._arriving:  # one look each: a load may end between two
            (arrived if resident.load.done() else loading).append(resident)
        self._arriving = loading
        for resident in arrived:
            try:
                self._publish(resident)
                worked("loader")
            except Exception as error:
                _log.error(
                    "adapter %s cannot be %s: %s",
                    resident.digest[:12],
                    "loaded to the device" if resident.is_requested else "warmed",
                    error,
                    extra={"part": "loader"},
                )
                resident.error = error
                self._failed.append(resident)
                if not resident.is_requested:  # otherwise ``ensure_resident`` raises the error
                    self._forget(resident)

    def _start_load(
        self, plan: AdapterPlan, *, requested: bool, spared: Collection[str] = ()
    ) -> ResidentAdapter | None:
        """Start a load; return None if there is no room now. Raises EngineError."""
        try:
            packed = self.packer.pack(plan).of_rank(0)
            on_host = self.packer.parts(plan)
            memory = self._reserve(plan.digest, packed, on_host, spared)
            if memory is None:
                return None
            try:
                resident = self._load(plan, memory, on_host)
            except BaseException:
                memory.free()
                raise
        except AdapterRefused as error:
            raise AdapterUnservable(str(error)) from error
        except EngineError:
            raise
        except Exception as error:  # memory, threads, the device: not the request's fault
            _log.exception(
                "the load of adapter %s cannot be started",
                plan.digest[:12],
                extra={"part": "loader"},
            )
            raise _load_failed(plan.digest) from error
        resident.is_requested = requested
        self._residents[plan.digest] = resident
        self._arriving.append(resident)
        # A callback and not the end of the load itself: the woken thread must find it done.
        resident.load.add_done_callback(lambda _: self._on_loaded())
        return resident

    def _load(
        self, plan: AdapterPlan, memory: AdapterMemory, on_host: DeviceParts
    ) -> ResidentAdapter:
        fallback = memory.parts.fallback
        return ResidentAdapter(
            digest=plan.digest,
            memory=memory,
            changes_head=self._output_head in plan.modules or fallback.changes(self._output_head),
            changes_ends=any(fallback.changes(name) for name in self._outside_layers),
            layer_kind=kind_of(
                memory.parts, plan, outside=self._outside_layers, projections=self._projections
            ),
            load=self._loader.submit(plan, memory, on_host),
        )

    def _reserve(
        self, digest: str, packed: PackedAdapter, on_host: DeviceParts, spared: Collection[str]
    ) -> AdapterMemory | None:
        """Reserve memory, evicting idle adapters; return None if there is no room now."""
        while True:
            try:
                return AdapterMemory.reserve(self.pool, packed, on_host)
            except PoolFull as error:
                victim = self._victim(spared)
                if victim is not None:
                    self._forget(victim)
                    self.n_evictions += 1
                elif spared or self._may_free_memory:
                    return None
                else:
                    raise NoAdapterSlot(
                        f"adapter {digest[:12]} has no place on the device, all of it is pinned: "
                        f"{error}; unpin an adapter, or raise --adapter-memory or --max-loras"
                    ) from error

    @property
    def _may_free_memory(self) -> bool:
        """True if an adapter is arriving, or is held and not pinned."""
        return any(
            not r.has_settled or (r.holders and r.digest not in self._pins)
            for r in self._residents.values()
        )

    def _victim(self, spared: Collection[str]) -> ResidentAdapter | None:
        """Return the least recently used idle adapter. Pins do not protect failed loads.

        An adapter that has just arrived is no victim before the next step, which may need it.
        """
        idle = [
            r
            for r in self._residents.values()
            if r.has_settled
            and not r.holders
            and not (r.digest in self._pins and r.is_published)
            and r.digest not in spared
        ]
        return min(idle, key=lambda r: r.last_used, default=None)

    def _forget(self, resident: ResidentAdapter) -> int:
        """Frees an adapter's memory on all ranks and returns the bytes."""
        del self._residents[resident.digest]
        self._note_residents()
        self._arriving = [other for other in self._arriving if other is not resident]
        self._others.forget(resident.digest)
        if self.gate_tables is not None:
            self.gate_tables.clear(resident.slot)
        return resident.memory.free()

    def _publish(self, resident: ResidentAdapter) -> None:
        """Publishes a loaded adapter on all ranks. Raises errors of the load."""
        experts = resident.load.result()
        self._others.publish(resident.digest)
        resident.memory.publish()
        if self.gate_tables is not None and resident.layer_kind is LayerKind.ROUTED_MLP:
            experts = self.gate_tables.write(resident.memory.slots, experts)
        resident.publish(experts)
        self._note_residents()
        self.n_loads += 1
        self.load_seconds += resident.load_s

    def _note_residents(self) -> None:
        residents = self.residents
        self.resident_bytes = {r.digest: r.n_bytes for r in residents}
        self.resident_load_s = {r.digest: r.load_s for r in residents}


def _load_failed(digest: str) -> AdapterLoadFailed:
    """Return the error for requests. The cause's message is only logged."""
    return AdapterLoadFailed(
        f"adapter {digest[:12]} could not be loaded to the device; the "
        "server's log says why, and the next request tries again"
    )
