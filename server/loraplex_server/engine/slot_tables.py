"""What recorded layers read of each adapter beside the pool's tables: routers and input scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_kernels.layout import NO_PAGE
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.routers import ROUTER_WORDS, GateFlags, GateRule, RouterTable
from loraplex_router.experts import PlacedExperts

from .host_copy import move_together

__all__ = ["SlotTables", "rule_of"]


def rule_of(experts: PlacedExperts) -> GateRule:
    """The gate of ``loraplex_router.experts`` as data."""
    match experts.strategy:
        case RoutingStrategy.TOP_K:
            return GateRule(experts.k, GateFlags.RENORMALISED)
        case RoutingStrategy.ARROW:
            return GateRule(experts.k, GateFlags.RENORMALISED | GateFlags.BY_SIZE)
        case RoutingStrategy.TOP_P:
            return GateRule(experts.k, GateFlags(0), experts.top_p)
        case RoutingStrategy.SWITCH:
            return GateRule(experts.k, GateFlags(0))
        case RoutingStrategy.DENSE:
            return GateRule(experts.k, GateFlags.IN_ORDER)


class SlotTables:
    """Owner of these tables, by the first slot of each adapter. Engine thread only.

    Written on the current stream, as the pool's tables are: steps that run keep what they read.
    """

    def __init__(
        self, pool: LoraPool, places: Collection[str], scaled: Sequence[Sequence[str]]
    ) -> None:
        """``places``: MLP blocks and projections. ``scaled``: linears whose inputs may be; those of
        a group share theirs."""
        self._storage = pool.storage
        self._places = {name: index for index, name in enumerate(sorted(places))}
        self._groups = tuple(map(tuple, scaled))
        self._scaled = {name: at for at, name in enumerate(chain.from_iterable(scaled))}
        n_slots, device = pool.n_slots, pool.device
        shape = (n_slots, len(self._places))
        self._words = torch.full((*shape, ROUTER_WORDS), NO_PAGE, dtype=torch.int64, device=device)
        self._top_p = torch.zeros(shape, dtype=torch.float32, device=device)
        self._load = torch.zeros(shape[::-1], dtype=torch.int64, device=device)
        self._offsets = torch.full(
            (n_slots, len(self._scaled)), NO_PAGE, dtype=torch.int64, device=device
        )

    def routers(self, *, of_projections: bool) -> dict[str, RouterTable]:
        """By place; of MLP blocks alone unless those of projections are asked for."""
        blocks = {name.rpartition(".")[0] for name in self._places} & self._places.keys()
        return {
            name: RouterTable(self._words[:, at], self._top_p[:, at], self._load[at])
            for name, at in self._places.items()
            if of_projections or name in blocks
        }

    @property
    def in_scales(self) -> dict[str, Tensor]:
        """By linear that shares its input with no other: offsets int64 [n_slots], see
        ``kernels.input_scales``."""
        lone = (group[0] for group in self._groups if len(group) == 1)
        return {name: self._offsets[:, self._scaled[name]] for name in lone}

    @property
    def slice_scales(self) -> dict[str, Tensor]:
        """By first linear of each other group: offsets int64 [n_slots, linears of the group]."""
        shared = (group for group in self._groups if len(group) > 1)
        first = {group[0]: (self._scaled[group[0]], len(group)) for group in shared}
        return {name: self._offsets[:, at : at + n] for name, (at, n) in first.items()}

    def write(
        self,
        slots: tuple[int, ...],
        experts: Mapping[str, PlacedExperts],
        in_scales: Mapping[str, Tensor],
    ) -> dict[str, PlacedExperts]:
        """Lets steps see an adapter in ``slots``, the first its own, the others its experts'.

        ``experts`` and ``in_scales`` lie in the pool. Returns the experts with their load here.
        """
        self._write_scales(slots[0], in_scales)
        if not experts:
            return {}
        words = np.full((len(self._places), ROUTER_WORDS), NO_PAGE, dtype=np.int64)
        top_p = np.zeros(len(self._places), dtype=np.float32)
        for name, placed in experts.items():
            at, rule = self._places[name], rule_of(placed)
            words[at] = (self._offset(placed.gate), placed.n_experts, slots[1], *rule[:2])
            top_p[at] = rule.top_p
        new_words, new_top_p = move_together([words, top_p], self._words.device)
        self._top_p[slots[0]] = new_top_p
        self._words[slots[0]] = new_words
        own = slice(slots[1], slots[-1] + 1)
        self._load[:, own] = 0
        return {
            name: replace(placed, load=self._load[self._places[name], own][: placed.n_experts])
            for name, placed in experts.items()
        }

    def clear(self, slots: tuple[int, ...]) -> None:
        """The slot is another adapter's from now on."""
        self._words[slots[0], :, 0] = NO_PAGE
        self._offsets[slots[0]] = NO_PAGE

    def _write_scales(self, slot: int, in_scales: Mapping[str, Tensor]) -> None:
        if not in_scales:
            return
        offsets = np.full(len(self._scaled), NO_PAGE, dtype=np.int64)
        for name, scale in in_scales.items():
            offsets[self._scaled[name]] = self._offset(scale)
        (new,) = move_together([offsets], self._offsets.device)
        self._offsets[slot] = new

    def _offset(self, tensor: Tensor) -> int:
        """Where in the storage it begins, in its own elements."""
        first = int(self._storage.storage_offset()) * self._storage.itemsize
        return int(tensor.storage_offset()) - first // tensor.itemsize
