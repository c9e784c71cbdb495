"""The tables of all targets in two flat buffers, so that one slot is written by one scatter."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .exponent_coding import EXPONENT_CODED
from .factors import KINDS
from .layout import NO_PAGE, PAGE_RANK, LoraTables, LoraTarget

__all__ = ["PoolTables"]


class PoolTables:
    """Writes slots into the ``LoraTables`` of every target. Owned by the pool."""

    def __init__(
        self, targets: Sequence[LoraTarget], n_slots: int, max_rank: int, device: torch.device
    ) -> None:
        self._targets = {target.name: target for target in targets}
        self._n_slices = np.array([target.n_slices for target in targets], dtype=np.int64)
        self._n_slots = n_slots
        self._device = device
        self._build(max(1, -(-max_rank // PAGE_RANK)))

    def of(self, target_name: str) -> LoraTables:
        return self._by_name[target_name]

    def write(
        self,
        slot: int,
        ranks: NDArray[np.int64],
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> None:
        """``ranks`` and ``keys`` as in ``PackedFactors``; ``offsets`` [n_pieces] in storage."""
        n_pages = -(-int(ranks[:, 2].max(initial=0)) // PAGE_RANK)
        if n_pages > self._max_pages:
            self._grow(n_pages)
        coded = offsets + keys[:, 4] * EXPONENT_CODED
        self._scatter(self._offsets, self._positions(slot, keys), coded)
        self._scatter(self._ranks, self._rank_positions(slot, ranks), ranks[:, 2])

    def clear(self, slot: int, ranks: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
        self._scatter(
            self._ranks, self._rank_positions(slot, ranks), np.zeros(len(ranks), dtype=np.int64)
        )
        gone = np.full(len(keys), NO_PAGE, dtype=np.int64)
        self._scatter(self._offsets, self._positions(slot, keys), gone)

    def _build(self, max_pages: int) -> None:
        self._max_pages = max_pages
        rows = self._n_slots * self._n_slices  # of each target
        self._pages_of = np.array([max_pages, max_pages, 1, 1], dtype=np.int64)  # by kind
        sizes = rows[:, None] * self._pages_of
        self._rank_first = np.cumsum(rows) - rows  # [n_targets], where each one's section begins
        self._first = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)  # [n_targets, kinds]
        n_ranks, n_offsets = int(rows.sum()), int(sizes.sum())
        self._ranks = torch.zeros(n_ranks, dtype=torch.int32, device=self._device)
        self._offsets = torch.full((n_offsets,), NO_PAGE, dtype=torch.int64, device=self._device)
        self._by_name = {name: self._view(i) for i, name in enumerate(self._targets)}

    def _view(self, index: int) -> LoraTables:
        n_slices = int(self._n_slices[index])
        shape = (self._n_slots, n_slices)

        def section(kind: str) -> Tensor:
            at = KINDS.index(kind)
            first, n_pages = int(self._first[index, at]), int(self._pages_of[at])
            flat = self._offsets[first : first + self._n_slots * n_slices * n_pages]
            return flat.view(*shape, n_pages) if kind in ("a", "b") else flat.view(shape)

        first = int(self._rank_first[index])
        return LoraTables(
            ranks=self._ranks[first : first + self._n_slots * n_slices].view(shape),
            a_pages=section("a"),
            b_pages=section("b"),
            scale=section("scale"),
            bias=section("bias"),
        )

    def _grow(self, n_pages: int) -> None:
        """Built aside, so that a failure changes nothing."""
        old_max, grown = self._max_pages, copy.copy(self)
        grown._build(max(n_pages, 2 * old_max))
        for name, before in self._by_name.items():
            after = grown._by_name[name]
            after.ranks.copy_(before.ranks)
            after.a_pages[..., :old_max].copy_(before.a_pages)
            after.b_pages[..., :old_max].copy_(before.b_pages)
            after.scale.copy_(before.scale)
            after.bias.copy_(before.bias)
        self.__dict__.update(grown.__dict__)

    def _positions(self, slot: int, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        target, slice_index, kind, page, _ = keys.T
        row = slot * self._n_slices[target] + slice_index
        positions: NDArray[np.int64] = self._first[target, kind] + row * self._pages_of[kind] + page
        return positions

    def _rank_positions(self, slot: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        target, slice_index, _ = ranks.T
        positions: NDArray[np.int64] = (
            self._rank_first[target] + slot * self._n_slices[target] + slice_index
        )
        return positions

    def _scatter(
        self, flat: Tensor, positions: NDArray[np.int64], values: NDArray[np.int64]
    ) -> None:
        if not len(positions):
            return
        if self._device.type == "cpu":
            view: NDArray[np.int64] = flat.numpy()
            view[positions] = values
            return
        both = torch.from_numpy(np.stack([positions, values])).pin_memory()
        places, new = both.to(self._device, non_blocking=True)  # steps go on meanwhile
        flat[places] = new.to(flat.dtype)
