"""The tables of all targets in two flat buffers, so that one entry is written by one scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layout import NO_PAGE, PAGE_RANK, LoraTables, LoraTarget

__all__ = ["PoolTables"]


class PoolTables:
    """Writes entries into the ``LoraTables`` of every target. Owned by the pool."""

    def __init__(
        self, targets: Sequence[LoraTarget], n_entries: int, max_rank: int, device: torch.device
    ) -> None:
        self._targets = {target.name: target for target in targets}
        self._n_entries = n_entries
        self._device = device
        self._build(max(1, -(-max_rank // PAGE_RANK)))

    def of(self, target_name: str) -> LoraTables:
        return self._by_name[target_name]

    def write(
        self,
        entry: int,
        ranks: Mapping[tuple[str, int], int],
        keys: Sequence[tuple[str, int, str, int]],
        offsets: Sequence[int],
    ) -> None:
        n_pages = max((-(-rank // PAGE_RANK) for rank in ranks.values()), default=0)
        if n_pages > self._max_pages:
            self._grow(n_pages)
        if keys:
            self._scatter(self._offsets, [self._position(entry, *key) for key in keys], offsets)
        if ranks:
            self._scatter(self._ranks, self._rank_positions(entry, ranks), list(ranks.values()))

    def clear(
        self,
        entry: int,
        ranks: Mapping[tuple[str, int], int],
        keys: Sequence[tuple[str, int, str, int]],
    ) -> None:
        if ranks:
            self._scatter(self._ranks, self._rank_positions(entry, ranks), [0] * len(ranks))
        if keys:
            positions = [self._position(entry, *key) for key in keys]
            self._scatter(self._offsets, positions, [NO_PAGE] * len(keys))

    def _build(self, max_pages: int) -> None:
        self._max_pages = max_pages
        self._rank_first: dict[str, int] = {}
        self._first: dict[tuple[str, str], int] = {}
        n_ranks = n_offsets = 0
        for name, target in self._targets.items():
            self._rank_first[name] = n_ranks
            n_ranks += self._n_entries * target.n_slices
            for kind in ("a", "b", "scale", "bias"):
                self._first[name, kind] = n_offsets
                n_offsets += self._n_entries * target.n_slices * self._pages_of(kind)
        self._ranks = torch.zeros(n_ranks, dtype=torch.int32, device=self._device)
        self._offsets = torch.full((n_offsets,), NO_PAGE, dtype=torch.int64, device=self._device)
        self._by_name = {name: self._view(name) for name in self._targets}

    def _pages_of(self, kind: str) -> int:
        return self._max_pages if kind in ("a", "b") else 1

    def _view(self, name: str) -> LoraTables:
        n_slices = self._targets[name].n_slices
        shape = (self._n_entries, n_slices)

        def section(kind: str) -> Tensor:
            first = self._first[name, kind]
            n_pages = self._pages_of(kind)
            flat = self._offsets[first : first + self._n_entries * n_slices * n_pages]
            return flat.view(*shape, n_pages) if kind in ("a", "b") else flat.view(shape)

        first = self._rank_first[name]
        return LoraTables(
            ranks=self._ranks[first : first + self._n_entries * n_slices].view(shape),
            a_pages=section("a"),
            b_pages=section("b"),
            scale=section("scale"),
            bias=section("bias"),
        )

    def _grow(self, n_pages: int) -> None:
        old, old_max = self._by_name, self._max_pages
        self._build(max(n_pages, 2 * old_max))
        for name, before in old.items():
            after = self._by_name[name]
            after.ranks.copy_(before.ranks)
            after.a_pages[..., :old_max].copy_(before.a_pages)
            after.b_pages[..., :old_max].copy_(before.b_pages)
            after.scale.copy_(before.scale)
            after.bias.copy_(before.bias)

    def _position(self, entry: int, name: str, slice_index: int, kind: str, page: int) -> int:
        row = entry * self._targets[name].n_slices + slice_index
        return self._first[name, kind] + row * self._pages_of(kind) + page

    def _rank_positions(self, entry: int, ranks: Mapping[tuple[str, int], int]) -> list[int]:
        return [
            self._rank_first[name] + entry * self._targets[name].n_slices + i for name, i in ranks
        ]

    def _scatter(self, flat: Tensor, positions: list[int], values: Sequence[int]) -> None:
        index = np.asarray(positions, dtype=np.int64)
        if self._device.type == "cpu":
            view: NDArray[np.int64] = flat.numpy()
            view[index] = values
            return
        host = torch.tensor(values, dtype=flat.dtype)
        flat[torch.from_numpy(index).to(self._device)] = host.to(self._device)
