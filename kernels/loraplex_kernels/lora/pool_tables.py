"""The tables of all targets in two flat buffers, so that one scatter writes a slot."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu.exponent_coding import EXPONENT_CODED
from loraplex_kernels.errors import BadFactors
from loraplex_kernels.formats.factors import KINDS
from loraplex_kernels.formats.layout import NO_PAGE, PAGE_RANK, LoraTables, LoraTarget


class PoolTables:
    """The ``LoraTables`` of every target. Owned by the pool."""

    def __init__(
        self, targets: Sequence[LoraTarget], n_slots: int, max_rank: int, storage: Tensor
    ) -> None:
        self._targets = tuple(targets)
        self._n_slices = np.array([target.n_slices for target in targets], dtype=np.int64)
        self._n_slots = n_slots
        self._storage = storage
        self._device = storage.device
        self._max_rank = max_rank
        max_pages = max(1, -(-max_rank // PAGE_RANK))
        rows = self._n_slots * self._n_slices  # of each target
        self._pages_of = np.array([max_pages, max_pages, 1, 1], dtype=np.int64)  # by kind
        sizes = rows[:, None] * self._pages_of
        self._rank_first = np.cumsum(rows) - rows  # [n_targets]: start of each section
        self._first = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)  # [n_targets, kinds]
        n_ranks, n_offsets = int(rows.sum()), int(sizes.sum())
        self._ranks = torch.zeros(n_ranks, dtype=torch.int32, device=self._device)
        self._offsets = torch.full((n_offsets,), NO_PAGE, dtype=torch.int64, device=self._device)
        self._by_name = {
            target.name: self._view(i, target) for i, target in enumerate(self._targets)
        }

    def of(self, target_name: str) -> LoraTables:
        return self._by_name[target_name]

    def write(
        self,
        slot: int,
        ranks: NDArray[np.int64],
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> None:
        """Write a slot. ``ranks`` and ``keys`` are those of ``PackedFactors``. Raises BadFactors.

        ``offsets`` [n_pieces] are the places of the pieces in the storage.
        """
        rank = int(ranks[:, 2].max(initial=0))
        if rank > self._max_rank:
            raise BadFactors(f"the factors have rank {rank}, the tables hold {self._max_rank}")
        coded = offsets + keys[:, 4] * EXPONENT_CODED
        self._scatter(self._offsets, self._positions(slot, keys), coded)
        self._scatter(self._ranks, self._rank_positions(slot, ranks), ranks[:, 2])

    def clear(self, slot: int, ranks: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
        self._scatter(
            self._ranks, self._rank_positions(slot, ranks), np.zeros(len(ranks), dtype=np.int64)
        )
        no_pages = np.full(len(keys), NO_PAGE, dtype=np.int64)
        self._scatter(self._offsets, self._positions(slot, keys), no_pages)

    def _view(self, index: int, target: LoraTarget) -> LoraTables:
        n_slices = target.n_slices
        shape = (self._n_slots, n_slices)

        def section(kind: str) -> Tensor:
            at = KINDS.index(kind)
            first, n_pages = int(self._first[index, at]), int(self._pages_of[at])
            flat = self._offsets[first : first + self._n_slots * n_slices * n_pages]
            return flat.view(*shape, n_pages) if kind in ("a", "b") else flat.view(shape)

        first = int(self._rank_first[index])
        return LoraTables(
            target,
            self._storage,
            ranks=self._ranks[first : first + self._n_slots * n_slices].view(shape),
            a_pages=section("a"),
            b_pages=section("b"),
            scale=section("scale"),
            bias=section("bias"),
        )

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
        index, new = both.to(self._device, non_blocking=True)  # does not block steps
        flat[index] = new.to(flat.dtype)
