"""The adapters on the device: placing and evicting them without stalling steps.

    absent ──place──▶ loading ──(loader thread fills)──▶ resident ──evict──▶ absent
                         └───────────(it failed)──────────────────────────▶ absent

The engine thread reserves memory and publishes tables, both quick; the loader thread copies. All
of an adapter lies in the pool: its factors in slots, everything else in tensors beside them.
Requests hold the adapter while they run, and a held adapter is never evicted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterRefused
from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_adapter_store.plan import AdapterPlan, PrefixPlan
from loraplex_kernels.errors import PoolFull
from loraplex_kernels.exponent_coding import prefers_coded_pages
from loraplex_kernels.pool import LoraPool, PoolTensors
from loraplex_router.experts import PlacedExperts
from loraplex_server.model.packed_lora_linear import PackedLoraLinear
from loraplex_server.model.routed import place_experts, slices_of
from loraplex_server.model.tensor_parallel import ShardLayout

from .adapter_packer import AdapterPacker, PackedAdapter
from .capabilities import EngineCapabilities
from .copy_stream import CopyStream
from .device import use_device
from .device_parts import DeviceParts
from .errors import AdapterLoadFailed, AdapterUnservable, EngineError, NoAdapterPlace
from .layer_kind import kind_of
from .parallel.other_pools import NoOtherPools, OtherPools
from .resident_adapter import ResidentAdapter
from .slot_tables import SlotTables

__all__ = ["DevicePool", "Placement"]

_log = logging.getLogger(__name__)

_TABLE_RANK = 64  # that tables have room for from the start, unless --max-lora-rank says otherwise


class Placement(Enum):
    RESIDENT = "resident"
    LOADING = "loading"
    FULL = "full"  # until a running request ends


class _Place(NamedTuple):
    slots: tuple[int, ...]
    memory: PoolTensors


class DevicePool:
    """Owner of device memory and its recency. Engine thread only, but for the loader's copies."""

    def __init__(
        self,
        groups: Mapping[str, PackedLoraLinear],
        *,
        n_bytes: int,
        max_adapters: int,
        capabilities: EngineCapabilities,
        dtype: torch.dtype,
        device: torch.device,
        on_loaded: Callable[[], object],
        exponent_coding: bool | None = None,
        layout: ShardLayout | None = None,
        others: OtherPools = NoOtherPools(),  # noqa: B008  stateless
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
        records_steps: bool = False,
    ) -> None:
        """``on_loaded`` is called once a load is done, on any thread: it must only wake the engine.

        ``records_steps``: recorded layers read ``slot_tables``.
        ``layout`` and ``others``: where this is rank 0's pool of several.
        ``exponent_coding``: as of ``LoraPool``; None = where it makes steps faster.
        """
        self.pool = LoraPool(
            [group.target for group in groups.values()],
            n_bytes=n_bytes,
            n_slots=max_adapters,
            dtype=dtype,
            device=device,
            max_rank=self._max_rank(capabilities),
            exponent_coding=prefers_coded_pages(dtype, device)
            if exponent_coding is None
            else exponent_coding,
        )
        self.n_loads = 0
        self.n_evictions = 0
        self.load_seconds = 0.0  # of all loads together
        # By digest, of those that are here. Replaced whole: other threads read them.
        self.resident_bytes: dict[str, int] = {}
        self.resident_load_s: dict[str, float] = {}  # of the load to here
        self.packer = AdapterPacker(groups, self.pool, capabilities, layout)
        self.slot_tables = (
            SlotTables(self.pool, capabilities.routable, self.packer.scaled_groups)
            if records_steps
            else None
        )
        others.open(n_bytes=n_bytes, n_slots=max_adapters, max_rank=self._max_rank(capabilities))
        self._others = others
        self._output_head = capabilities.output_head
        self._outside_layers = {capabilities.input_embedding, capabilities.output_head}
        self._slices = slices_of(groups.values())
        self._device = device
        self._on_loaded = on_loaded
        self._faults = faults
        self._residents: dict[str, ResidentAdapter] = {}
        self._arriving: list[ResidentAdapter] = []  # not published yet
        self._failed: list[ResidentAdapter] = []  # in this step
        self._pins: set[str] = set()
        self._copies = CopyStream(device)
        self._loader = ThreadPoolExecutor(
            1, thread_name_prefix="loraplex-loader", initializer=use_device, initargs=(device,)
        )

    def place(self, plan: AdapterPlan, *, spared: Collection[str] = ()) -> Placement:
        """Brings an adapter that a request needs to the device; evicts idle ones for it.

        ``spared``: digests that are not evicted for it, since they are needed sooner.
        Raises AdapterUnservable if it can never fit, AdapterLoadFailed if its load failed (the next
        call tries again), and NoAdapterPlace if only unpinning others would make room.
        """
        resident = self._residents.get(plan.digest)
        if resident is None:
            resident = self._start_load(plan, asked_for=True, spared=spared)
        if resident is None:
            return Placement.FULL
        resident.is_asked_for = True
        if not resident.load.done():
            return Placement.LOADING
        self._settle_arrived()
        if resident.error is not None:
            self._forget(resident)
            raise _load_failed(plan.digest) from resident.error
        resident.last_used = time.monotonic()
        return Placement.RESIDENT

    def warm(self, plan: AdapterPlan) -> None:
        """Starts a load and does not wait. Errors are logged."""
        if plan.digest in self._residents:
            return
        try:
            self._start_load(plan, asked_for=False)
        except EngineError as error:
            _log.warning("adapter %s cannot be warmed: %s", plan.digest[:12], error)

    def publish_arrived(self) -> None:
        """Lets the kernels see what the loader has finished, asked for or only warmed.

        Once a step. Of a load that failed in an earlier step nobody wants to hear any more: who
        asked for it has left, and the next request tries again.
        """
        for stale in [one for one in self._failed if self._residents.get(one.digest) is one]:
            self._forget(stale)
        self._failed.clear()
        self._settle_arrived()

    def _settle_arrived(self) -> None:
        if not self._arriving:
            return
        arrived: list[ResidentAdapter] = []
        loading: list[ResidentAdapter] = []
        for resident in self._arriving:  # asked once each: a load may end between two looks
            (arrived if resident.load.done() else loading).append(resident)
        self._arriving = loading
        for resident in arrived:
            try:
                self._publish(resident)
                self._faults.worked("loader")
            except Exception as error:
                self._faults.failed("loader", error)
                _log.warning(
                    "adapter %s cannot be %s: %s",
                    resident.digest[:12],
                    "loaded to the device" if resident.is_asked_for else "warmed",
                    error,
                )
                resident.error = error
                self._failed.append(resident)
                if not resident.is_asked_for:  # else whoever asked hears of it
                    self._forget(resident)

    def hold(self, digest: str) -> None:
        resident = self._residents[digest]
        if not resident.is_published:  # kernels would read rank 0: the base would answer
            raise RuntimeError(f"adapter {digest[:12]} is held before it is on the device")
        resident.holders += 1

    def release(self, digest: str) -> None:
        resident = self._residents[digest]
        if resident.holders <= 0:
            raise RuntimeError(f"adapter {digest[:12]} released more often than held")
        resident.holders -= 1
        resident.last_used = time.monotonic()

    def resident(self, digest: str) -> ResidentAdapter:
        """Of an adapter that is held."""
        return self._residents[digest]

    def prefix(self, digest: str) -> PrefixPlan | None:
        """Of an adapter that is held, on the device."""
        return self._residents[digest].parts.prefix

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """A pinned adapter is not evicted once it is resident."""
        (self._pins.add if pinned else self._pins.discard)(digest)
        if digest in self._residents:
            self._residents[digest].is_pinned = pinned

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    def is_loading(self, digest: str) -> bool:
        resident = self._residents.get(digest)
        return resident is not None and not resident.load.done()

    def drop(self, digest: str) -> int:
        """Frees an idle adapter's memory at once; returns the bytes, 0 if absent or held."""
        resident = self._residents.get(digest)
        if resident is None or resident.holders or not resident.load.done():
            return 0
        return self._forget(resident)

    @property
    def residents(self) -> tuple[ResidentAdapter, ...]:
        """Those that are on the device."""
        return tuple(one for one in self._residents.values() if one.is_published)

    @property
    def resident_digests(self) -> tuple[str, ...]:
        return tuple(self.resident_bytes)

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _max_rank(capabilities: EngineCapabilities) -> int:
        return capabilities.max_rank or _TABLE_RANK

    def _start_load(
        self, plan: AdapterPlan, *, asked_for: bool, spared: Collection[str] = ()
    ) -> ResidentAdapter | None:
        """None while there is no place. Raises EngineError, and then nothing is taken."""
        try:
            packed = self.packer.pack(plan).of_rank(0)
            on_host = self.packer.parts(plan)
            place = self._reserve(plan.digest, packed, on_host, spared)
            if place is None:
                return None
            try:
                return self._submit_load(plan, packed, on_host, place, asked_for=asked_for)
            except BaseException:
                self._free(place)
                raise
        except AdapterRefused as error:
            raise AdapterUnservable(str(error)) from error
        except EngineError:
            raise
        except Exception as error:  # memory, threads, the device: not the request's doing
            self._faults.failed("loader", error)
            _log.exception("the load of adapter %s cannot be started", plan.digest[:12])
            raise _load_failed(plan.digest) from error

    def _submit_load(
        self,
        plan: AdapterPlan,
        packed: PackedAdapter,
        on_host: DeviceParts,
        place: _Place,
        *,
        asked_for: bool,
    ) -> ResidentAdapter:
        parts = on_host.with_tensors(place.memory.tensors)
        mark = self._copies.mark()
        load_elsewhere = self._others.load(plan, place.slots[0])

        def load() -> Mapping[str, PlacedExperts]:
            """Loader thread."""
            self._copies.run(mark, lambda: self._copy(place, on_host))
            load_elsewhere()
            gated = {
                name: replace(experts, gate=parts.gates[name])
                for name, experts in plan.experts.items()
            }
            return place_experts(gated, place.slots[1:], self._device, self._slices)

        resident = ResidentAdapter(
            digest=plan.digest,
            slots=place.slots,
            parts=parts,
            memory=place.memory,
            n_bytes=packed.n_bytes + place.memory.n_bytes,
            changes_head=self._output_head in plan.modules
            or parts.fallback.changes(self._output_head),
            changes_ends=any(parts.fallback.changes(name) for name in self._outside_layers),
            layer_kind=kind_of(
                parts,
                plan,
                outside=self._outside_layers,
                projections=self._slices.keys(),
                lone=self.packer.lone,
            ),
            load=self._loader.submit(load),
            is_asked_for=asked_for,
            is_pinned=plan.digest in self._pins,
        )
        self._residents[plan.digest] = resident
        self._arriving.append(resident)
        # Not at the end of the load itself: whoever is woken must find it done.
        resident.load.add_done_callback(lambda _: self._on_loaded())
        return resident

    def _reserve(
        self, digest: str, packed: PackedAdapter, parts: DeviceParts, spared: Collection[str]
    ) -> _Place | None:
        like = parts.tensors(self.pool.storage.dtype)
        while True:
            try:
                return self._take(packed, like)
            except PoolFull as error:
                victim = self._victim(spared)
                if victim is not None:
                    self._forget(victim)
                    self.n_evictions += 1
                elif spared or self._will_change:
                    return None
                else:
                    raise NoAdapterPlace(
                        f"adapter {digest[:12]} has no place on the device, all of it is pinned: "
                        f"{error}; unpin an adapter, or raise --adapter-memory or --max-loras"
                    ) from error

    def _take(self, packed: PackedAdapter, like: Sequence[tuple[Tensor, torch.dtype]]) -> _Place:
        """Raises PoolFull; then nothing is taken."""
        memory = self.pool.reserve_tensors(like)
        try:
            return _Place(self.pool.reserve_group(packed.factors), memory)
        except BaseException:
            self.pool.release_tensors(memory)
            raise

    @property
    def _will_change(self) -> bool:
        """Whether an adapter that is here now may go: a pinned one stays, however idle it gets."""
        return any(
            not one.load.done() or (one.holders and not one.is_pinned)
            for one in self._residents.values()
        )

    def _victim(self, spared: Collection[str]) -> ResidentAdapter | None:
        """The idle adapter that was used least recently. A failed load holds no place."""
        idle = [
            one
            for one in self._residents.values()
            if one.load.done()
            and not one.holders
            and not (one.is_pinned and one.is_published)
            and one.digest not in spared
        ]
        return min(idle, key=lambda one: one.last_used, default=None)

    def _forget(self, resident: ResidentAdapter) -> int:
        """Frees all it takes; returns the bytes."""
        del self._residents[resident.digest]
        self._note_bytes()
        self._arriving = [other for other in self._arriving if other is not resident]
        self._others.forget(resident.digest)
        if self.slot_tables is not None:
            self.slot_tables.clear(resident.slots)
        return self._free(_Place(resident.slots, resident.memory))

    def _free(self, place: _Place) -> int:
        freed = sum(self.pool.remove(slot) for slot in place.slots)
        return freed + self.pool.release_tensors(place.memory)

    def _copy(self, place: _Place, on_host: DeviceParts) -> None:
        """Loader thread."""
        for slot in place.slots:
            self.pool.fill(slot)
        like = on_host.tensors(self.pool.storage.dtype)
        for target, (source, _) in zip(place.memory.tensors, like, strict=True):
            target.copy_(source, non_blocking=True)

    def _publish(self, resident: ResidentAdapter) -> None:
        """Raises what the load raised."""
        experts = resident.load.result()
        self._others.publish(resident.digest)
        for slot in resident.slots:
            self.pool.publish(slot)
        if self.slot_tables is not None and resident.layer_kind is not None:
            in_scales = resident.parts.fallback.in_scales
            experts = self.slot_tables.write(resident.slots, experts, in_scales)
        resident.experts = experts
        resident.is_published = True
        self._note_bytes()
        self.n_loads += 1
        seconds = time.monotonic() - resident.started_at
        self.load_seconds += seconds
        here = self.resident_load_s.items()
        kept = {digest: was for digest, was in here if digest in self._residents}
        self.resident_load_s = {**kept, resident.digest: seconds}

    def _note_bytes(self) -> None:
        self.resident_bytes = {one.digest: one.n_bytes for one in self.residents}


def _load_failed(digest: str) -> AdapterLoadFailed:
    """The error's own message is for the log: it may name anything."""
    return AdapterLoadFailed(
        f"adapter {digest[:12]} could not be loaded to the device; the "
        "server's log says why, and the next request tries again"
    )
