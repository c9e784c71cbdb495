"""The paged pool of adapter factors: one flat storage, and the tables that kernels read it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import PoolFull
from .extents import ExtentAllocator
from .factors import EntryFactors, Piece, cut_into_pieces
from .layout import LoraTables, LoraTarget
from .pool_tables import PoolTables
from .storage import allocate_storage

__all__ = ["LoraPool"]

_ALIGNMENT_BYTES = 64


@dataclass(slots=True)
class _Entry:
    extents: list[tuple[int, int]]  # (start, length) in units of the alignment
    offsets: list[int]  # of each piece, in elements
    table_keys: list[tuple[str, int, str, int]]  # (target, slice, kind, page) of each piece
    ranks: dict[tuple[str, int], int]
    is_published: bool = False


class LoraPool:
    """Owns the storage and the tables. One thread calls it; ``fill`` alone may run on any other.

    An entry is the factors of one (adapter, expert) for all targets. Loading has two phases, so
    that copying never holds up a step: ``reserve`` takes the space, ``fill`` casts and copies,
    ``publish`` writes the tables. Until then kernels see rank 0 there. Ranks are true in memory:
    an entry takes its own bytes and at most an alignment of 64 bytes for each page.
    """

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        *,
        n_bytes: int,
        n_entries: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_rank: int = 64,
    ) -> None:
        """``max_rank`` sizes the tables. Larger ranks are taken too, but replace them once."""
        self.device = torch.device(device)
        self.targets = {target.name: target for target in targets}
        self.n_entries = n_entries
        self._unit = _ALIGNMENT_BYTES // dtype.itemsize  # elements
        n_units = n_bytes // _ALIGNMENT_BYTES
        self.storage = allocate_storage(n_units * self._unit, dtype, self.device)
        self._extents = ExtentAllocator(n_units)
        self._entries: dict[int, _Entry] = {}
        self._tables = PoolTables(targets, n_entries, max_rank, self.device)

    @property
    def bytes_total(self) -> int:
        return self._extents.size * _ALIGNMENT_BYTES

    @property
    def bytes_used(self) -> int:
        return (self._extents.size - self._extents.n_free) * _ALIGNMENT_BYTES

    @property
    def entries(self) -> tuple[int, ...]:
        """The ids taken, ascending."""
        return tuple(sorted(self._entries))

    def tables(self, target_name: str) -> LoraTables:
        """The current tables of a target. A rank larger than any before replaces the object."""
        return self._tables.of(target_name)

    def bytes_needed(self, factors: EntryFactors) -> int:
        """Bytes that ``reserve`` would take. Raises BadFactors."""
        pieces = cut_into_pieces(self.targets, factors)
        return sum(self._units_of(piece) for piece in pieces) * _ALIGNMENT_BYTES

    def reserve(self, factors: EntryFactors) -> int:
        """Takes space for an entry and returns its id. Copies nothing. Raises PoolFull."""
        return self.reserve_group([factors])[0]

    def reserve_group(self, group: Sequence[EntryFactors]) -> tuple[int, ...]:
        """Consecutive entries, as the experts of a routed adapter need them: all, or PoolFull."""
        cut = [cut_into_pieces(self.targets, factors) for factors in group]
        n_units = sum(self._units_of(piece) for pieces in cut for piece in pieces)
        first = self._find_ids(len(group))
        if first is None or n_units > self._extents.n_free:
            raise self._full(n_units, len(group))
        taken: list[_Entry] = []
        for factors, pieces in zip(group, cut, strict=True):
            entry = self._place(factors, pieces)
            if entry is None:
                for other in taken:
                    self._free_extents(other.extents)
                raise self._full(n_units, len(group))
            taken.append(entry)
        ids = tuple(range(first, first + len(group)))
        self._entries.update(zip(ids, taken, strict=True))
        return ids

    def fill(self, entry: int, factors: EntryFactors) -> None:
        """Casts and copies the factors given to ``reserve``. Any thread, on its current stream."""
        pieces = cut_into_pieces(self.targets, factors)
        offsets = self._entries[entry].offsets
        if self.device.type == "cpu":
            for piece, offset in zip(pieces, offsets, strict=True):
                _copy_piece(self.storage, offset, piece.source)
        else:
            self._fill_by_runs(pieces, offsets)

    def publish(self, entry: int) -> None:
        """Lets kernels see the entry. On a device: ordered on the current stream."""
        record = self._entries[entry]
        self._tables.write(entry, record.ranks, record.table_keys, record.offsets)
        record.is_published = True

    def remove(self, entry: int) -> int:
        """Forgets an entry, published or not; returns the bytes that it freed."""
        record = self._entries.pop(entry)
        if record.is_published:
            self._tables.clear(entry, record.ranks, record.table_keys)
        self._free_extents(record.extents)
        return sum(length for _, length in record.extents) * _ALIGNMENT_BYTES

    def _units_of(self, piece: Piece) -> int:
        return -(-piece.source.numel() // self._unit)

    def _find_ids(self, count: int) -> int | None:
        """First of ``count`` consecutive free ids, the lowest there are."""
        first = 0
        for taken in [*sorted(self._entries), self.n_entries]:
            if taken - first >= count:
                return first
            first = taken + 1
        return None

    def _place(self, factors: EntryFactors, pieces: list[Piece]) -> _Entry | None:
        """One stretch for the whole entry where there is one (best to read); else page by page."""
        lengths = [self._units_of(piece) for piece in pieces]
        n_units = sum(lengths)
        start = self._extents.take(n_units) if n_units else 0
        extents: list[tuple[int, int]] = []
        if start is not None:
            extents = [(start, n_units)] if n_units else []
            starts = (np.cumsum([0, *lengths])[:-1] + start).tolist()
        else:
            starts = []
            # Longest first, so that short pieces do not eat the gaps that long ones need.
            order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            placed: dict[int, int] = {}
            for i in order:
                at = self._extents.take(lengths[i])
                if at is None:
                    self._free_extents(extents)
                    return None
                extents.append((at, lengths[i]))
                placed[i] = at
            starts = [placed[i] for i in range(len(lengths))]
        return _Entry(
            extents=extents,
            offsets=[at * self._unit for at in starts],
            table_keys=[(p.target, p.slice_index, p.kind, p.page) for p in pieces],
            ranks={
                (name, i): one.rank
                for name, slices in factors.items()
                for i, one in enumerate(slices)
                if one is not None
            },
        )

    def _free_extents(self, extents: list[tuple[int, int]]) -> None:
        for start, length in extents:
            self._extents.free(start, length)

    def _full(self, n_units: int, n_entries: int) -> PoolFull:
        return PoolFull(
            n_units * _ALIGNMENT_BYTES,
            self._extents.n_free * _ALIGNMENT_BYTES,
            n_entries=n_entries,
            free_entries=self.n_entries - len(self._entries),
        )

    def _fill_by_runs(self, pieces: list[Piece], offsets: list[int]) -> None:
        """Builds pinned images of neighbouring pieces, so that a device gets few, large copies."""
        runs: list[list[int]] = []  # of piece indices
        end = -1
        for i in sorted(range(len(pieces)), key=lambda i: offsets[i]):
            if offsets[i] != end:
                runs.append([])
            runs[-1].append(i)
            end = offsets[i] + self._units_of(pieces[i]) * self._unit
        pin = self.device.type == "cuda"
        for run in runs:
            first = offsets[run[0]]
            length = offsets[run[-1]] + pieces[run[-1]].source.numel() - first
            image = torch.zeros(length, dtype=self.storage.dtype, pin_memory=pin)
            for i in run:
                _copy_piece(image, offsets[i] - first, pieces[i].source)
            self.storage[first : first + length].copy_(image, non_blocking=True)


def _copy_piece(flat: Tensor, offset: int, source: Tensor) -> None:
    flat[offset : offset + source.numel()].view(source.shape).copy_(source)
