"""Rows that are trained on many times: what the layers below the adapters make of them stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .frozen_base import FrozenBase
from .packing import TOKENS_AT_ONCE, PackedBatch, Row, in_parts, pack

__all__ = ["KnownRows"]


class KnownRows:
    """Runs the layers below `first_layer` once for each row; a row there sees the head and itself.

    For one thread. Keeps `hidden_size` numbers for each token of each row that it was asked for.
    """

    def __init__(self, base: FrozenBase, first_layer: int, head: Sequence[int]) -> None:
        self._base, self._first_layer, self._head = base, first_layer, tuple(head)
        self._states: dict[Row, Tensor] = {}  # [n_tokens, hidden]
        self._head_state = torch.empty(0)

    def batch(self, groups: Sequence[Sequence[Row]]) -> tuple[PackedBatch, Tensor]:
        """Packed, and `below` as `FrozenBase.score` takes it."""
        self._learn([row for rows in groups for row in rows if row not in self._states])
        batch = pack(self._head, groups)
        below = self._head_state.new_zeros(*batch.tokens.shape, self._head_state.shape[-1])
        for i, rows in enumerate(groups):
            known = torch.cat([self._head_state, *[self._states[row] for row in rows]])
            below[i, : len(known)] = known
        return batch, below

    def _learn(self, rows: Sequence[Row]) -> None:
        n_head = len(self._head)
        for part in in_parts(list(dict.fromkeys(rows)), TOKENS_AT_ONCE):
            states = self._base.below(pack(self._head, [part]), self._first_layer)[0]
            self._head_state = states[:n_head]
            sizes = [len(row.tokens) for row in part]
            self._states.update(zip(part, torch.split(states[n_head:], sizes), strict=True))
