"""Maps of a linear's inputs or outputs, kept as their difference from the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import RowMap

__all__ = ["BlockRotation", "ButterflyRotation", "PairRotation"]


@dataclass(frozen=True, slots=True)
class BlockRotation(RowMap):
    """x ← x (I + D), D of square blocks on the diagonal (OFT)."""

    blocks: Tensor  # [n_blocks, k, k]; [1, k, k]: the same all along

    def apply(self, x: Tensor) -> Tensor:
        return x + _blockwise(x, self.blocks)

    def n_products(self, in_features: int, out_features: int) -> int:
        return in_features * self.blocks.shape[1]


@dataclass(frozen=True, slots=True)
class ButterflyRotation(RowMap):
    """x ← x (I + D_n) … (I + D_1), each D of blocks in an order of its own (BOFT)."""

    blocks: Tensor  # [n_factors, n_blocks, k, k]
    orders: Tensor  # int32 [n_factors, in_features]: D_i mixes x[orders[i]] block by block

    def apply(self, x: Tensor) -> Tensor:
        for blocks, order in zip(self.blocks.flip(0), self.orders.long().flip(0), strict=True):
            mixed = _blockwise(x[:, order], blocks)
            x = x.index_add(1, order, mixed)
        return x

    def n_products(self, in_features: int, out_features: int) -> int:
        return self.blocks.shape[0] * in_features * self.blocks.shape[2]


@dataclass(frozen=True, slots=True)
class PairRotation(RowMap):
    """Outputs i and j = i + k/2 of each group of k are turned and scaled together (ROAD).

    y[i] ← (1 + own[i]) y[i] − other[i] y[j],   y[j] ← (1 + own[j]) y[j] + other[j] y[i]
    """

    own: Tensor  # [out_features]: α cos θ − 1
    other: Tensor  # [out_features]: α sin θ
    group_size: int

    def apply(self, x: Tensor) -> Tensor:
        first, second = x.reshape(x.shape[0], -1, 2, self.group_size // 2).unbind(dim=2)
        turned = torch.stack((-second, first), dim=2).flatten(1)
        return x + x * self.own.to(x.dtype) + turned * self.other.to(x.dtype)

    def n_products(self, in_features: int, out_features: int) -> int:
        return 2 * out_features


def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x [n_rows, n_blocks·k] times a block-diagonal matrix."""
    cut = x.reshape(x.shape[0], -1, blocks.shape[1]).transpose(0, 1)
    return (cut @ blocks.to(x.dtype)).transpose(0, 1).flatten(1)
