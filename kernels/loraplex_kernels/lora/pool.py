"""The paged pool of adapter factors: a flat storage, and the tables of its contents."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.errors import PoolFull
from loraplex_kernels.formats.factors import AdapterFactors
from loraplex_kernels.formats.layout import MAX_RANK, LoraTables, LoraTarget
from loraplex_kernels.formats.storage import allocate_storage

from .extents import ExtentAllocator
from .packed_factors import ALIGNMENT_BYTES, PackedFactors, pack_factors
from .pinned_memory import PinnedMemory
from .pool_tables import PoolTables


@dataclass(frozen=True, slots=True)
class PoolTensors:
    """Tensors of an adapter other than factors, allocated in the pool's storage."""

    tensors: tuple[Tensor, ...]  # uninitialised, each contiguous
    extents: tuple[tuple[int, int], ...]  # (start, length) in units of the alignment

    @property
    def n_bytes(self) -> int:
        return sum(length for _, length in self.extents) * ALIGNMENT_BYTES


@dataclass(slots=True)
class _Slot:
    extents: list[tuple[int, int]]  # (start, length) in units of the alignment
    offsets: NDArray[np.int64]  # of each piece, in elements of the storage
    packed: PackedFactors | None  # None once published
    keys: NDArray[np.int64]
    ranks: NDArray[np.int64]


class LoraPool:
    """Owner of the storage and the tables. One thread; ``pack`` and ``fill`` may run on others.

    An adapter slot holds the factors of one (adapter, expert) for all targets. Loading has four
    phases, so that no phase delays a step: ``pack`` casts and lays out on the host, ``reserve``
    allocates, ``fill`` copies, ``publish`` writes the tables. Before ``publish`` kernels read rank
    0 for the slot. Ranks are not padded: factors take their own bytes, and each page is aligned to
    64 bytes. Other tensors of an adapter are in the same storage (``reserve_tensors``), so
    ``bytes_used`` counts all that adapters take.
    """

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        *,
        n_bytes: int,
        n_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_rank: int = MAX_RANK,
        exponent_coding: bool = False,
    ) -> None:
        """``max_rank`` sizes the tables, which never move, since recorded steps read them.

        ``exponent_coding``: store pages in twelve bits a value where possible. This needs bfloat16
        on a CPU and the native library. ``prefers_coded_pages`` says where it makes steps faster.
        """
        self.device = torch.device(device)
        self.exponent_coding = exponent_coding
        self._pinned = None if self.device.type == "cpu" else PinnedMemory()
        self.targets = {target.name: target for target in targets}
        self.n_slots = n_slots
        self._unit = ALIGNMENT_BYTES // dtype.itemsize  # elements
        n_units = n_bytes // ALIGNMENT_BYTES
        self.storage = allocate_storage(n_units * self._unit, dtype, self.device)
        self._extents = ExtentAllocator(n_units)
        self._slots: dict[int, _Slot] = {}
        self._tables = PoolTables(targets, n_slots, max_rank, self.storage)

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
        """The used slots, ascending."""
        return tuple(sorted(self._slots))

    def tables(self, target_name: str) -> LoraTables:
        """Return the tables of a target."""
        return self._tables.of(target_name)

    def pack(self, factors: AdapterFactors) -> PackedFactors:
        """Return the factors in this pool's dtype and layout. Any thread. Raises BadFactors."""
        with self._current_device():
            return pack_factors(
                self.targets,
                factors,
                self.storage.dtype,
                exponent_coding=self.exponent_coding,
                pinned=self._pinned,
            )

    def adopt(self, packed: PackedFactors) -> PackedFactors:
        """Return packed factors of an equal pool in memory that ``fill`` can copy from."""
        if self._pinned is None or packed.image.is_pinned():
            return packed
        with self._current_device():
            image = self._pinned.empty(packed.image.numel(), packed.image.dtype)
        return replace(packed, image=image.copy_(packed.image))

    def reserve(self, packed: PackedFactors) -> int:
        """Allocate a slot and space for its factors. Returns the slot. Raises PoolFull."""
        return self.reserve_group([packed])[0]

    def reserve_group(
        self, group: Sequence[PackedFactors], *, first: int | None = None
    ) -> tuple[int, ...]:
        """Allocate consecutive slots for the experts of a routed adapter. Raises PoolFull.

        ``first``: the first slot, as the pool of another process chose it.
        """
        n_units = sum(packed.n_bytes for packed in group) // ALIGNMENT_BYTES
        if first is None:
            first = self._find_ids(len(group))
        elif not self._slots.keys().isdisjoint(range(first, first + len(group))):
            raise ValueError(f"some of the {len(group)} slots from {first} on are in use")
        if first is None or n_units > self._extents.n_free:
            raise self._full(n_units, len(group))
        slots: list[_Slot] = []
        try:
            for packed in group:
                slot = self._allocate(packed)
                if slot is None:
                    raise self._full(n_units, len(group))
                slots.append(slot)
        except BaseException:
            for other in slots:
                self._free_extents(other.extents)
            raise
        ids = tuple(range(first, first + len(group)))
        self._slots.update(zip(ids, slots, strict=True))
        return ids

    def reserve_tensors(self, like: Sequence[tuple[Tensor, torch.dtype]]) -> PoolTensors:
        """Allocate tensors of these shapes and dtypes. Raises PoolFull."""
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

    def release_tensors(self, reserved: PoolTensors) -> int:
        """Free the tensors, which must not be read any more. Returns the bytes."""
        self._free_extents([extent for extent in reserved.extents if extent[1]])
        return reserved.n_bytes

    def fill(self, slot: int) -> None:
        """Copy the reserved factors. Any thread, on its current stream."""
        record = self._slots[slot]
        packed = record.packed
        if packed is None:
            raise RuntimeError(f"slot {slot} is published already")
        for first, last in _runs(record.offsets, packed.lengths):
            begin = int(packed.starts[first])
            end = int(packed.starts[last] + packed.lengths[last])
            offset = int(record.offsets[first])
            target = self.storage[offset : offset + end - begin]
            target.copy_(packed.image[begin:end], non_blocking=True)

    def publish(self, slot: int) -> None:
        """Make the slot's factors visible to kernels, in the order of the current stream."""
        record = self._slots[slot]
        record.packed = None  # first: if writing fails, ``remove`` clears the tables
        self._tables.write(slot, record.ranks, record.keys, record.offsets)

    def remove(self, slot: int) -> int:
        """Free a slot, published or not. Returns the bytes."""
        record = self._slots.pop(slot)
        if record.packed is None:
            self._tables.clear(slot, record.ranks, record.keys)
        self._free_extents(record.extents)
        return sum(length for _, length in record.extents) * ALIGNMENT_BYTES

    def _current_device(self) -> AbstractContextManager[object]:
        """Set the device for page-locked memory, which threads of a server have not set.

        Otherwise a server on cuda:1 would take memory of device 0, too.
        """
        return nullcontext() if self.device.type == "cpu" else torch.cuda.device(self.device)

    def _find_ids(self, count: int) -> int | None:
        """Return the lowest first of ``count`` consecutive free slots; None if there are none."""
        first = 0
        for used in [*sorted(self._slots), self.n_slots]:
            if used - first >= count:
                return first
            first = used + 1
        return None

    def _allocate(self, packed: PackedFactors) -> _Slot | None:
        """Allocate one extent for all factors, which is fastest to read; else page by page."""
        n_units = packed.n_bytes // ALIGNMENT_BYTES
        start = self._extents.take(n_units) if n_units else 0
        if start is not None:
            extents = [(start, n_units)] if n_units else []
            offsets = packed.starts + start * self._unit
            return _Slot(extents, offsets, packed, packed.keys, packed.ranks)
        return self._allocate_piecewise(packed)

    def _allocate_piecewise(self, packed: PackedFactors) -> _Slot | None:
        lengths = (packed.lengths // self._unit).tolist()
        extents: list[tuple[int, int]] = []
        offsets = np.empty(len(lengths), dtype=np.int64)
        # Longest first: short pieces must not take the gaps that long pieces need.
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
    """Return the bytes that ``reserve_tensors`` allocates."""
    return sum(_n_units(tensor, dtype) for tensor, dtype in like) * ALIGNMENT_BYTES


def _n_units(tensor: Tensor, dtype: torch.dtype) -> int:
    return -(-tensor.numel() * dtype.itemsize // ALIGNMENT_BYTES)


def _runs(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, last) of runs of pieces that are neighbours in the storage and the image."""
    if not len(offsets):
        return []
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + lengths[:-1])
    firsts = [0, *(breaks + 1).tolist()]
    lasts = [*breaks.tolist(), len(offsets) - 1]
    return list(zip(firsts, lasts, strict=True))
