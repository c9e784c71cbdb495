"""The adapters of a rank that another leads: what rank 0's ``DevicePool`` decides, done here.

Two threads: the main thread publishes and forgets, in order with the steps; the loader's thread
fills. A load waits until all that was forgotten before it has given its place back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.pool import LoraPool, PoolTensors
from loraplex_router.experts import PlacedExperts, RoutedRows
from loraplex_server.engine.adapter_packer import AdapterPacker, PackedAdapter
from loraplex_server.engine.capabilities import EngineCapabilities
from loraplex_server.engine.copy_stream import CopyStream
from loraplex_server.engine.device_parts import DeviceParts
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.forward_context import FallbackRows, ForwardContext
from loraplex_server.model.routed import place_experts, rows_for, slices_of

__all__ = ["ShardPool"]


@dataclass(slots=True)
class _Loaded:
    slots: tuple[int, ...]
    memory: PoolTensors
    parts: DeviceParts = field(default_factory=DeviceParts)
    experts: Mapping[str, PlacedExperts] = field(default_factory=dict)
    is_published: bool = False


class ShardPool:
    """Owner of this rank's adapter memory."""

    def __init__(self, model: BaseModel, *, n_bytes: int, n_slots: int, max_rank: int) -> None:
        targets = [group.target for group in model.groups.values()]
        self.pool = LoraPool(
            targets,
            n_bytes=n_bytes,
            n_slots=n_slots,
            dtype=model.dtype,
            device=model.device,
            max_rank=max_rank,
            exponent_coding=False,
        )
        self._packer = AdapterPacker(
            model.groups, self.pool, EngineCapabilities.of_model(model, max_rank=None)
        )
        self._slices = slices_of(model.groups.values())
        self._device = model.device
        self._copies = CopyStream(model.device)
        self._changed = threading.Condition()  # guards all that follows, and the pool's allocator
        self._loaded: dict[str, _Loaded] = {}
        self._n_forgotten = 0

    def load(self, plan: AdapterPlan, packed: PackedAdapter, *, first: int, after: int) -> None:
        """Loader thread. ``first``: the slot that rank 0 chose, ``after``: forgotten before.

        Raises what the pool or the device raises; then nothing is taken.
        """
        parts = self._packer.parts(plan)
        like = parts.tensors(self.pool.storage.dtype)
        with self._changed:
            self._changed.wait_for(lambda: self._n_forgotten >= after)
            memory = self.pool.reserve_tensors(like)
            try:
                slots = self.pool.reserve_group(packed.factors, first=first)
            except BaseException:
                self.pool.release_tensors(memory)
                raise
            loaded = self._loaded[plan.digest] = _Loaded(slots, memory)
            mark = self._copies.mark()
        try:
            self._copies.run(mark, lambda: self._copy(slots, memory, like))
            on_device = parts.with_tensors(memory.tensors)
            gated = {
                name: replace(experts, gate=on_device.gates[name])
                for name, experts in plan.experts.items()
            }
            loaded.parts = on_device
            loaded.experts = place_experts(gated, slots[1:], self._device, self._slices)
        except BaseException:
            with self._changed:
                self._free(self._loaded.pop(plan.digest))
            raise

    def publish(self, digest: str) -> None:
        """Main thread: from the next step on rows may have it."""
        with self._changed:
            loaded = self._loaded[digest]
            for slot in loaded.slots:
                self.pool.publish(slot)
            loaded.is_published = True

    def forget(self, digest: str) -> None:
        """Main thread. Of an adapter whose load failed there is nothing to free."""
        with self._changed:
            loaded = self._loaded.pop(digest, None)
            if loaded is not None:
                self._free(loaded)
            self._n_forgotten += 1
            self._changed.notify_all()

    def bind_rows(self, step: ForwardContext) -> None:
        """Sets the adapters' parts beyond the pool for the rows in ``step.own_rows``."""
        fallback: list[FallbackRows] = []
        routed: dict[str, tuple[RoutedRows, ...]] = {}
        for digest, rows in step.own_rows.items():
            loaded = self._loaded[digest]
            if not loaded.is_published:  # kernels would read rank 0: the base would answer
                raise RuntimeError(f"adapter {digest[:12]} has rows before it is on the device")
            if not loaded.parts.fallback.is_empty:
                fallback.append(FallbackRows(rows, loaded.parts.fallback))
            for place, part in rows_for(loaded.experts, rows).items() if loaded.experts else ():
                routed[place] = (*routed.get(place, ()), part)
        step.fallback, step.routed = tuple(fallback), routed

    def restore(self, header: int, tensors: list[Tensor]) -> PackedAdapter:
        """What rank 0's packer dumped for this rank."""
        return self._packer.restore(header, tensors)

    def _copy(
        self,
        slots: tuple[int, ...],
        memory: PoolTensors,
        like: list[tuple[Tensor, torch.dtype]],
    ) -> None:
        for slot in slots:
            self.pool.fill(slot)
        for target, (source, _) in zip(memory.tensors, like, strict=True):
            target.copy_(source, non_blocking=True)

    def _free(self, loaded: _Loaded) -> None:
        for slot in loaded.slots:
            self.pool.remove(slot)
        self.pool.release_tensors(loaded.memory)
