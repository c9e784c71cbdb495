"""The device memory of one adapter in the pool of its rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.lora.pool import LoraPool, PoolTensors
from loraplex_router.experts.expansion import PlacedExperts
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.layers.routed import place_experts, slices_of
from loraplex_server.model.trunk import Trunk

from .adapter_packer import PackedAdapter
from .device_parts import DeviceParts


def new_pool(model: Trunk, limits: PoolLimits, *, exponent_coding: bool) -> LoraPool:
    """Return a pool for the linears of ``model``."""
    return LoraPool(
        [group.target for group in model.groups.values()],
        n_bytes=limits.n_bytes,
        n_slots=limits.n_slots,
        dtype=model.dtype,
        device=model.device,
        max_rank=limits.max_rank,
        exponent_coding=exponent_coding,
    )


@dataclass(frozen=True, slots=True)
class AdapterMemory:
    """Slots for factors, and tensors for all other parts."""

    pool: LoraPool
    slots: tuple[int, ...]  # the first for unrouted factors, one for each expert
    tensors: PoolTensors
    parts: DeviceParts  # views of ``tensors``
    n_bytes: int

    @staticmethod
    def reserve(
        pool: LoraPool, packed: PackedAdapter, on_host: DeviceParts, *, first: int | None = None
    ) -> AdapterMemory:
        """Reserve memory, with slots from ``first`` on. Raises PoolFull and reserves nothing."""
        tensors = pool.reserve_tensors(on_host.tensors(pool.storage.dtype))
        try:
            slots = pool.reserve_group(packed.factors, first=first)
        except BaseException:
            pool.release_tensors(tensors)
            raise
        parts = on_host.with_tensors(tensors.tensors)
        return AdapterMemory(pool, slots, tensors, parts, packed.n_bytes + tensors.n_bytes)

    def copy(
        self, on_host: DeviceParts, plan: AdapterPlan, model: Trunk
    ) -> Mapping[str, PlacedExperts]:
        """Copy factors and parts to the device, on the current stream. Any thread.

        Returns the plan's experts with their gates and slots on the device.
        """
        for slot in self.slots:
            self.pool.fill(slot)
        sources = on_host.tensors(self.pool.storage.dtype)
        for target, (source, _) in zip(self.tensors.tensors, sources, strict=True):
            staged = source if target.device.type == "cpu" else source.pin_memory()
            target.copy_(staged, non_blocking=True)
        gated = {
            site: replace(experts, gate=self.parts.gates[site])
            for site, experts in plan.experts.items()
        }
        slices = slices_of(model.groups.values())
        return place_experts(gated, self.slots[1:], model.device, slices)

    def publish(self) -> None:
        """Lets kernels read the factors. Ordered on the current stream."""
        for slot in self.slots:
            self.pool.publish(slot)

    def free(self) -> int:
        """Frees the memory and returns its bytes."""
        n_bytes = sum(self.pool.remove(slot) for slot in self.slots)
        return n_bytes + self.pool.release_tensors(self.tensors)
