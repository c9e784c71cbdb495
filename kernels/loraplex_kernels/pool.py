"""The paged pool of adapter factors: one flat storage, and the tables that kernels read it by."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import PoolFull
from .extents import ExtentAllocator
from .factors import AdapterFactors
from .layout import LoraTables, LoraTarget
from .packed_factors import ALIGNMENT_BYTES, PackedFactors, pack_factors
from .pool_tables import PoolTables
from .storage import allocate_storage

__all__ = ["LoraPool", "PoolTensors", "pool_bytes"]


@dataclass(frozen=True, slots=True)
class PoolTensors:
    """Tensors that lie in the pool beside the factors. Their memory is the pool's."""

    tensors: tuple[Tensor, ...]  # uninitialised, each in one piece
    extents: tuple[tuple[int, int], ...]  # (start, length) in units of the alignment

    @property
    def n_bytes(self) -> int:
        return sum(length for _, length in self.extents) * ALIGNMENT_BYTES


@dataclass(slots=True)
class _Slot:
    extents: list[tuple[int, int]]  # (start, length) in units of the alignment
    offsets: NDArray[np.int64]  # of each piece, in elements of the storage
    packed: PackedFactors | None  # until it is published
    keys: NDArray[np.int64]
    ranks: NDArray[np.int64]


class LoraPool:
    """Owns the storage and the tables. One thread calls it; ``pack`` and ``fill`` may be any other.

    An adapter slot holds the factors of one (adapter, expert) for all targets. Loading has phases,
    so that none of them holds up a step: ``pack`` casts and lays out, on the host, once;
    ``reserve`` takes the space, ``fill`` copies, ``publish`` writes the tables. Until then kernels
    see rank 0 there. Ranks are true in memory: factors take their own bytes and at most an
    alignment of 64 bytes for each page. Other tensors of an adapter come to lie in the same storage
    (``reserve_tensors``), so that ``bytes_used`` is all that adapters take.
    """

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        *,
        n_bytes: int,
        n_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_rank: int = 64,
        exponent_coding: bool = False,
    ) -> None:
        """``max_rank`` sizes the tables. Larger ranks are taken too, but replace them once.

        ``exponent_coding``: pages are kept in twelve bits a value where they can be. For bfloat16
        on a CPU with the native library; ``prefers_coded_pages`` says where steps become faster.
        """
        self.device = torch.device(device)
        self.exponent_coding = exponent_coding
        self.targets = {target.name: target for target in targets}
        self.n_slots = n_slots
        self._unit = ALIGNMENT_BYTES // dtype.itemsize  # elements
        n_units = n_bytes // ALIGNMENT_BYTES
        self.storage = allocate_storage(n_units * self._unit, dtype, self.device)
        self._extents = ExtentAllocator(n_units)
        self._slots: dict[int, _Slot] = {}
        self._tables = PoolTables(targets, n_slots, max_rank, self.device)

    @property
    def bytes_total(self) -> int:
        return self._extents.size * ALIGNMENT_BYTES

    @property
    def bytes_used(self) -> int:
        return (self._extents.size - self._extents.n_free) * ALIGNMENT_BYTES

    @property
    def n_slots_used(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> tuple[int, ...]:
        """The ids taken, ascending."""
        return tuple(sorted(self._slots))

    def tables(self, target_name: str) -> LoraTables:
        """The current tables of a target. A rank larger than any before replaces the object."""
        return self._tables.of(target_name)

    def pack(self, factors: AdapterFactors) -> PackedFactors:
        """The factors in this pool's dtype and layout. Any thread. Raises BadFactors."""
        with self._current_device():
            return pack_factors(
                self.targets,
                factors,
                self.storage.dtype,
                exponent_coding=self.exponent_coding,
                pin_memory=self.device.type != "cpu",
            )

    def adopt(self, packed: PackedFactors) -> PackedFactors:
        """What ``pack`` made earlier, perhaps for an equal pool, in memory fit for ``fill``."""
        if self.device.type == "cpu" or packed.image.is_pinned():
            return packed
        with self._current_device():
            return replace(packed, image=packed.image.pin_memory())

    def reserve(self, packed: PackedFactors) -> int:
        """Takes a slot and space for its factors; returns the slot. Raises PoolFull."""
        return self.reserve_group([packed])[0]

    def reserve_group(
        self, group: Sequence[PackedFactors], *, first: int | None = None
    ) -> tuple[int, ...]:
        """Consecutive slots, as the experts of a routed adapter need them: all, or PoolFull.

        ``first``: the id to begin with, as the pool of another process chose it.
        """
        n_units = sum(packed.n_bytes for packed in group) // ALIGNMENT_BYTES
        if first is None:
            first = self._find_ids(len(group))
        elif not self._slots.keys().isdisjoint(range(first, first + len(group))):
            raise ValueError(f"of the slots from {first} on some are taken")
        if first is None or n_units > self._extents.n_free:
            raise self._full(n_units, len(group))
        taken: list[_Slot] = []
        try:
            for packed in group:
                slot = self._place(packed)
                if slot is None:
                    raise self._full(n_units, len(group))
                taken.append(slot)
        except BaseException:
            for other in taken:
                self._free_extents(other.extents)
            raise
        ids = tuple(range(first, first + len(group)))
        self._slots.update(zip(ids, taken, strict=True))
        return ids

    def reserve_tensors(self, like: Sequence[tuple[Tensor, torch.dtype]]) -> PoolTensors:
        """Takes space for tensors of these shapes in these dtypes: all, or PoolFull."""
        lengths = [_n_units(tensor, dtype) for tensor, dtype in like]
        extents: list[tuple[int, int]] = []
        try:
            for length in lengths:
                start = self._extents.take(length) if length else 0
                if start is None:
                    raise self._full(sum(lengths), 0)
                extents.append((start, length))
            memory = self.storage.view(torch.uint8)
            tensors = [
                memory[start * ALIGNMENT_BYTES :][: tensor.numel() * dtype.itemsize]
                .view(dtype)
                .view(tensor.shape)
                for (tensor, dtype), (start, _) in zip(like, extents, strict=True)
            ]
        except BaseException:
            self._free_extents([extent for extent in extents if extent[1]])
            raise
        return PoolTensors(tuple(tensors), tuple(extents))

    def release_tensors(self, taken: PoolTensors) -> int:
        """Gives their space back; returns the bytes. Nobody may read them any more."""
        self._free_extents([extent for extent in taken.extents if extent[1]])
        return taken.n_bytes

    def fill(self, slot: int) -> None:
        """Copies what ``reserve`` took space for. Any thread, on its current stream."""
        record = self._slots[slot]
        packed = record.packed
        if packed is None:
            raise RuntimeError(f"slot {slot} is published already")
        for first, last in _runs(record.offsets, packed.lengths):
            begin = int(packed.starts[first])
            end = int(packed.starts[last] + packed.lengths[last])
            offset = int(record.offsets[first])
            place = self.storage[offset : offset + end - begin]
            place.copy_(packed.image[begin:end], non_blocking=True)

    def publish(self, slot: int) -> None:
        """Lets kernels see the slot's factors. On a device: ordered on the current stream."""
        record = self._slots[slot]
        record.packed = None  # first: if writing stops half-way, ``remove`` clears what is there
        self._tables.write(slot, record.ranks, record.keys, record.offsets)

    def remove(self, slot: int) -> int:
        """Empties a slot, published or not; returns the bytes that it freed."""
        record = self._slots.pop(slot)
        if record.packed is None:
            self._tables.clear(slot, record.ranks, record.keys)
        self._free_extents(record.extents)
        return sum(length for _, length in record.extents) * ALIGNMENT_BYTES

    def _current_device(self) -> AbstractContextManager[object]:
        """Page-locked memory comes from the current device, which a thread of a server has not set.

        Without this a server on cuda:1 would take memory of device 0, too.
        """
        return nullcontext() if self.device.type == "cpu" else torch.cuda.device(self.device)

    def _find_ids(self, count: int) -> int | None:
        """First of ``count`` consecutive free ids, the lowest there are."""
        first = 0
        for taken in [*sorted(self._slots), self.n_slots]:
            if taken - first >= count:
                return first
            first = taken + 1
        return None

    def _place(self, packed: PackedFactors) -> _Slot | None:
        """One extent for all factors where there is one (best to read); else page by page."""
        n_units = packed.n_bytes // ALIGNMENT_BYTES
        start = self._extents.take(n_units) if n_units else 0
        if start is not None:
            extents = [(start, n_units)] if n_units else []
            offsets = packed.starts + start * self._unit
            return _Slot(extents, offsets, packed, packed.keys, packed.ranks)
        return self._place_piecewise(packed)

    def _place_piecewise(self, packed: PackedFactors) -> _Slot | None:
        lengths = (packed.lengths // self._unit).tolist()
        extents: list[tuple[int, int]] = []
        offsets = np.empty(len(lengths), dtype=np.int64)
        # Longest first, so that short pieces do not eat the gaps that long ones need.
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            at = self._extents.take(lengths[i])
            if at is None:
                self._free_extents(extents)
                return None
            extents.append((at, lengths[i]))
            offsets[i] = at * self._unit
        return _Slot(extents, offsets, packed, packed.keys, packed.ranks)

    def _free_extents(self, extents: Sequence[tuple[int, int]]) -> None:
        for start, length in extents:
            self._extents.free(start, length)

    def _full(self, n_units: int, n_slots: int) -> PoolFull:
        return PoolFull(
            n_units * ALIGNMENT_BYTES,
            self._extents.n_free * ALIGNMENT_BYTES,
            n_slots=n_slots,
            free_slots=self.n_slots - self.n_slots_used,
        )


def pool_bytes(like: Sequence[tuple[Tensor, torch.dtype]]) -> int:
    """What ``reserve_tensors`` takes for these."""
    return sum(_n_units(tensor, dtype) for tensor, dtype in like) * ALIGNMENT_BYTES


def _n_units(tensor: Tensor, dtype: torch.dtype) -> int:
    return -(-tensor.numel() * dtype.itemsize // ALIGNMENT_BYTES)


def _runs(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, last) of the pieces that are neighbours in the storage as in the image."""
    if not len(offsets):
        return []
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + lengths[:-1])
    firsts = [0, *(breaks + 1).tolist()]
    lasts = [*breaks.tolist(), len(offsets) - 1]
    return list(zip(firsts, lasts, strict=True))
