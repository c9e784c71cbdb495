"""The gates of routed adapters, by MLP block and adapter slot, as captured steps read them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from loraplex_kernels.formats.gate_table import GATE_WORDS, GateTable
from loraplex_kernels.formats.host_copy import move_together
from loraplex_kernels.formats.layout import NO_PAGE
from loraplex_kernels.lora.pool import LoraPool
from loraplex_router.experts.expansion import PlacedExperts


class GateTables:
    """Owner of the tables. Engine thread only.

    Writes are ordered on the current stream, as those of the pool's tables are: a running step
    keeps what it reads.
    """

    def __init__(self, pool: LoraPool, blocks: Iterable[str]) -> None:
        self._storage = pool.storage
        self._blocks = {name: index for index, name in enumerate(sorted(blocks))}
        shape = (pool.n_slots, len(self._blocks))
        words = (*shape, GATE_WORDS)
        self._words = torch.full(words, NO_PAGE, dtype=torch.int64, device=pool.device)
        self._load = torch.zeros(shape[::-1], dtype=torch.int64, device=pool.device)

    def by_block(self) -> dict[str, GateTable]:
        return {
            name: GateTable(self._words[:, index], self._load[index])
            for name, index in self._blocks.items()
        }

    def write(
        self, slots: tuple[int, ...], experts: Mapping[str, PlacedExperts]
    ) -> dict[str, PlacedExperts]:
        """Publish the gates of an adapter in ``slots``: its own slot, then those of its experts.

        The gates must lie in the pool. Returns ``experts`` with their load counters in the tables.
        """
        if not experts:
            return {}
        words = np.full((len(self._blocks), GATE_WORDS), NO_PAGE, dtype=np.int64)
        base = int(self._storage.storage_offset()) * self._storage.itemsize // 4  # in float32
        for name, placed in experts.items():
            offset = int(placed.gate.storage_offset()) - base
            words[self._blocks[name]] = (offset, placed.n_experts, slots[1], placed.k)
        (moved,) = move_together([words], self._words.device)
        self._words[slots[0]] = moved
        own = slice(slots[1], slots[-1] + 1)
        self._load[:, own] = 0
        return {
            name: replace(placed, load=self._load[self._blocks[name], own][: placed.n_experts])
            for name, placed in experts.items()
        }

    def clear(self, slot: int) -> None:
        """Forget the gates of ``slot``, which another adapter may take."""
        self._words[slot, :, 0] = NO_PAGE
