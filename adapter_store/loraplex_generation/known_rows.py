"""Rows that are trained on many times: what the layers below the adapters make of them stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .frozen_base import FrozenBase
from .packing import PackedBatch, Row, pack

__all__ = ["KnownRows"]

_TOKENS = 1024  # of rows in a forward


class KnownRows:
    """Runs the layers below `first_layer` once for each row; a row there sees the head and itself.

    Stateless afterwards.
    """

    def __init__(
        self, base: FrozenBase, first_layer: int, head: Sequence[int], rows: Sequence[Row]
    ) -> None:
        self._head = tuple(head)
        self._states: dict[Row, Tensor] = {}  # [n_tokens, hidden]
        self._head_state = torch.empty(0)
        for part in _parts(rows):
            states = base.below(pack(head, [part]), first_layer)[0]
            self._head_state = states[: len(head)]
            sizes = [len(head), *[len(row.tokens) for row in part]]
            self._states.update(zip(part, torch.split(states, sizes)[1:], strict=True))

    def batch(self, groups: Sequence[Sequence[Row]]) -> tuple[PackedBatch, Tensor]:
        """Packed, and `below` as `FrozenBase.score` takes it. Raises KeyError for another row."""
        batch = pack(self._head, groups)
        below = self._head_state.new_zeros(*batch.tokens.shape, self._head_state.shape[-1])
        for i, rows in enumerate(groups):
            known = torch.cat([self._head_state, *[self._states[row] for row in rows]])
            below[i, : len(known)] = known
        return batch, below


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    parts: list[list[Row]] = [[]]
    left = _TOKENS
    for row in rows:
        if parts[-1] and len(row.tokens) > left:
            parts.append([])
            left = _TOKENS
        parts[-1].append(row)
        left -= len(row.tokens)
    return parts
