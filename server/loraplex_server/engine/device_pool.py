"""Which adapters have a place on the device, and how they get one without stalling the steps.

    absent ──place──▶ loading ──(loader thread fills)──▶ resident ──evict──▶ absent

The engine thread reserves pages and publishes tables, both quick; the loader thread copies. The
adapter comes in its device form if it comes from the host tier. Requests hold the adapter while
they run, and a held adapter is never evicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterRefused
from loraplex_adapter_store.plan import AdapterPlan, ModulePlan
from loraplex_kernels.errors import PoolFull
from loraplex_kernels.exponent_coding import prefers_coded_pages
from loraplex_kernels.packed_factors import PackedFactors
from loraplex_kernels.pool import LoraPool
from loraplex_router.experts import PlacedExperts, RoutedRows
from loraplex_server.model.packed_lora_linear import PackedLoraLinear
from loraplex_server.model.routed import place_experts, rows_for

from .adapter_packer import AdapterPacker
from .capabilities import EngineCapabilities
from .copy_stream import CopyStream
from .errors import AdapterUnservable
from .plan_tensors import moved

__all__ = ["DevicePool", "Placement", "ResidentAdapter"]


class Placement(Enum):
    RESIDENT = "resident"
    LOADING = "loading"
    FULL = "full"  # every byte is held by running requests or pinned


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """One adapter on the device; ``slots[0]`` holds its unrouted factors, the rest its experts."""

    digest: str
    slots: tuple[int, ...]
    n_bytes: int
    plan: AdapterPlan
    fallback: Mapping[str, ModulePlan]  # modules beyond low-rank factors, on the device
    replaced_weights: Mapping[str, Tensor]
    experts: Mapping[str, PlacedExperts]  # by MLP block or projection
    load: Future[None]
    started_at: float
    load_s: float = 0.0
    published: bool = False
    holders: int = 0
    pinned: bool = False
    last_used: float = field(default_factory=time.monotonic)
    _rows: Tensor | None = None  # of ``_routed``
    _routed: Mapping[str, RoutedRows] = field(default_factory=dict)

    @property
    def needs_fallback(self) -> bool:
        """Whether it has parts that the pool's operator does not apply."""
        return bool(self.fallback or self.replaced_weights or self.experts)

    def routed_rows(self, rows: Tensor) -> Mapping[str, RoutedRows]:
        """``rows_for`` of its experts, kept from step to step: decode steps repeat."""
        if self._rows is None or not torch.equal(self._rows, rows):
            self._rows, self._routed = rows, rows_for(self.experts, rows)
        return self._routed


class DevicePool:
    """Owner of device resident and its recency. Engine thread only, but for the loader's fills."""

    def __init__(
        self,
        groups: Mapping[str, PackedLoraLinear],
        *,
        n_bytes: int,
        max_adapters: int,
        capabilities: EngineCapabilities,
        dtype: torch.dtype,
        device: torch.device,
        on_loaded: Callable[[], None],
        exponent_coding: bool | None = None,
    ) -> None:
        """``on_loaded`` is called once a load is done, on any thread: it must only wake the engine.

        ``exponent_coding``: as of ``LoraPool``; None = where it makes steps faster.
        """
        self.pool = LoraPool(
            [group.target for group in groups.values()],
            n_bytes=n_bytes,
            n_slots=max_adapters,
            dtype=dtype,
            device=device,
            exponent_coding=prefers_coded_pages(dtype, device)
            if exponent_coding is None
            else exponent_coding,
        )
        self.n_loads = 0
        self.n_evictions = 0
        self.load_seconds = 0.0  # of all loads together
        self.packer = AdapterPacker(groups, self.pool, capabilities)
        self._dtype = dtype
        self._device = device
        self._on_loaded = on_loaded
        self._residents: dict[str, ResidentAdapter] = {}
        self._arriving: list[ResidentAdapter] = []  # not published yet
        self._pins: set[str] = set()
        self._copies = CopyStream(device)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loraplex-loader")

    def place(self, plan: AdapterPlan) -> Placement:
        """Makes sure the adapter is on its way to the device; evicts idle ones if it must.

        Raises AdapterUnservable if it can never fit or its load failed.
        """
        resident = self._residents.get(plan.digest)
        if resident is None:
            resident = self._start_load(plan)
            if resident is None:
                return Placement.FULL
        if not resident.load.done():
            return Placement.LOADING
        self.publish_arrived()
        error = resident.load.exception()
        if error is not None:
            self._evict(resident)
            raise AdapterUnservable(
                f"adapter {plan.digest[:12]} could not be placed on the device: {error}"
            ) from error
        resident.last_used = time.monotonic()
        return Placement.RESIDENT

    def publish_arrived(self) -> None:
        """Lets the kernels see what the loader has finished, asked for or only warmed."""
        if not self._arriving:
            return
        arrived = [resident for resident in self._arriving if resident.load.done()]
        self._arriving = [resident for resident in self._arriving if resident not in arrived]
        for resident in arrived:
            if resident.load.exception() is None:
                self._publish(resident)

    def hold(self, digest: str) -> None:
        self._residents[digest].holders += 1

    def release(self, digest: str) -> None:
        resident = self._residents[digest]
        if resident.holders <= 0:
            raise RuntimeError(f"adapter {digest[:12]} released more often than held")
        resident.holders -= 1
        resident.last_used = time.monotonic()

    def resident(self, digest: str) -> ResidentAdapter:
        """Of an adapter that is held."""
        return self._residents[digest]

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """A pinned adapter is not evicted once it is resident."""
        (self._pins.add if pinned else self._pins.discard)(digest)
        if digest in self._residents:
            self._residents[digest].pinned = pinned

    def drop(self, digest: str) -> int:
        """Frees an idle adapter's pages at once; returns the bytes, 0 if absent or held."""
        resident = self._residents.get(digest)
        if resident is None or resident.holders or not resident.load.done():
            return 0
        return self._evict(resident)

    @property
    def residents(self) -> tuple[ResidentAdapter, ...]:
        """Those that are on the device."""
        return tuple(resident for resident in self._residents.values() if resident.published)

    @property
    def resident_digests(self) -> tuple[str, ...]:
        return tuple(d for d, resident in self._residents.items() if resident.load.done())

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _start_load(self, plan: AdapterPlan) -> ResidentAdapter | None:
        try:
            form = self.packer.form(plan)
        except AdapterRefused as error:
            raise AdapterUnservable(str(error)) from error
        n_bytes = form.n_bytes
        slots = self._reserve(form.factors)
        if slots is None:
            return None
        resident = ResidentAdapter(
            digest=plan.digest,
            slots=slots,
            n_bytes=n_bytes,
            plan=replace(plan, packed_adapter=None),  # the pool has it: the host may let it go
            fallback=moved(self.packer.fallback_modules(plan), self._device, self._dtype),
            replaced_weights=moved(plan.replaced_weights, self._device, self._dtype),
            experts=place_experts(plan.experts, slots[1:], self._device),
            load=self._loader.submit(self._fill, slots, self._copies.mark()),
            started_at=time.monotonic(),
            pinned=plan.digest in self._pins,
        )
        self._residents[plan.digest] = resident
        self._arriving.append(resident)
        # Not at the end of the load itself: whoever is woken must find it done.
        resident.load.add_done_callback(lambda _: self._on_loaded())
        return resident

    def _reserve(self, group: Sequence[PackedFactors]) -> tuple[int, ...] | None:
        while True:
            try:
                return self.pool.reserve_group(group)
            except PoolFull:
                victim = self._victim()
                if victim is None:
                    return None
                self._evict(victim)

    def _victim(self) -> ResidentAdapter | None:
        """The idle adapter that was used least recently."""
        idle = [
            resident
            for resident in self._residents.values()
            if not resident.holders and not resident.pinned and resident.load.done()
        ]
        return min(idle, key=lambda resident: resident.last_used, default=None)

    def _evict(self, resident: ResidentAdapter) -> int:
        del self._residents[resident.digest]
        self._arriving = [other for other in self._arriving if other is not resident]
        self.n_evictions += 1
        return sum(self.pool.remove(slot) for slot in resident.slots)

    def _fill(self, slots: Sequence[int], mark: torch.cuda.Event | None) -> None:
        """Loader thread."""

        def copy() -> None:
            for slot in slots:
                self.pool.fill(slot)

        self._copies.run(mark, copy)

    def _publish(self, resident: ResidentAdapter) -> None:
        for slot in resident.slots:
            self.pool.publish(slot)
        resident.published = True
        resident.load_s = time.monotonic() - resident.started_at
        self.n_loads += 1
        self.load_seconds += resident.load_s
