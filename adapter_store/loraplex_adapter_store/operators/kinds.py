"""The operators of plans: full-rank updates in their smallest form, and rotations.

Rotations map a linear's inputs or outputs, and are stored as differences from the identity.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from .contract import BaseProduct, Delta, Operator, RowMap


@dataclass(frozen=True, slots=True)
class DenseDelta(Delta):
    """A dense ΔW, as large as the weight. Used only if no other form fits."""

    linear_in = "weight"

    weight: Tensor  # [out_features, in_features]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


@dataclass(frozen=True, slots=True)
class Kronecker(Delta):
    """left ⊗ right (LoKr): [a·b, c·d] from [a, c] and [b, d]."""

    linear_in = "left"

    left: Tensor  # [a, c]
    right: Tensor  # [b, d]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        grid = x.reshape(-1, left.shape[1], right.shape[1])
        return (left @ (grid @ right.t())).flatten(1)


@dataclass(frozen=True, slots=True)
class Circulant(Delta):
    """Circulant blocks of b × b (C3A), multiplied as spectra in float32.

    ΔW[m·b + i, n·b + j] = kernel[m, n, (j − i) mod b].
    """

    linear_in = "kernel"

    kernel: Tensor  # [n_out_blocks, n_in_blocks, b]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        _, n_blocks, size = self.kernel.shape
        blocks = torch.fft.ifft(x.float().reshape(-1, n_blocks, size))
        mixed = torch.einsum("tnb,mnb->tmb", blocks, torch.fft.fft(self.kernel.float()))
        delta: Tensor = torch.fft.fft(mixed).real.flatten(1)
        return delta.to(x.dtype)


@dataclass(frozen=True, slots=True)
class SparseDelta(Delta):
    """Single entries of ΔW (SHiRA, SuperTuning, WaveFT), summed in float32."""

    places: Tensor  # int32 [2, n_entries]: rows, columns; sorted, without duplicates
    values: Tensor  # [n_entries]
    out_features: int

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        size = (self.out_features, x.shape[1])
        delta = torch.sparse_coo_tensor(
            self.places.long(), self.values.float(), size, is_coalesced=True, check_invariants=False
        )
        added: Tensor = torch.sparse.mm(delta, x.float().t()).t()
        return added.to(x.dtype)


@dataclass(frozen=True, slots=True)
class FourierDelta(Delta):
    """Re(ifft2(S)) of a sparse S [out, in] (FourierFT), in float32, without a dense ΔW."""

    places: Tensor  # int32 [2, n_entries]: rows, columns of S
    values: Tensor  # [n_entries]
    out_features: int

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        rows, columns = self.places.long()
        waves = torch.fft.ifft(x.float())[:, columns] * self.values.float()
        spectrum = waves.new_zeros(x.shape[0], self.out_features).index_add_(1, rows, waves)
        delta: Tensor = torch.fft.ifft(spectrum).real
        return delta.to(x.dtype)


@dataclass(frozen=True, slots=True)
class MaskedWeight(Delta):
    """W ⊙ (B A) (HiRA, GLoRA), entry by entry: Σ_ρ diag(b_ρ) W diag(a_ρ).

    Takes one product with the base for each of the r ranks, and no copy of W.
    """

    linear_in = "b"

    a: Tensor  # [r, in_features]
    b: Tensor  # [out_features, r]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        rank = self.a.shape[0]
        masked = (x.unsqueeze(1) * self.a.to(x.dtype)).flatten(0, 1)  # [n_rows·r, in]
        products = product(masked).view(x.shape[0], rank, -1)
        return torch.einsum("trm,mr->tm", products, self.b.to(products.dtype)).to(x.dtype)


@dataclass(frozen=True, slots=True)
class SumDelta(Delta):
    """The sum of the updates of a mixture."""

    parts: tuple[Delta, ...]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        total = self.parts[0].apply(x, product)
        for part in self.parts[1:]:
            total = total + part.apply(x, product)
        return total

    @property
    def acts(self) -> bool:
        return any(part.acts for part in self.parts)

    def scaled(self, weight: float) -> Self:
        return replace(self, parts=tuple(part.scaled(weight) for part in self.parts))


@dataclass(frozen=True, slots=True)
class BlockRotation(RowMap):
    """x ← x (I + D), D of square blocks on the diagonal (OFT)."""

    blocks: Tensor  # [n_blocks, k, k], or [1, k, k] for one block everywhere

    def apply(self, x: Tensor) -> Tensor:
        return x + _blockwise(x, self.blocks)


@dataclass(frozen=True, slots=True)
class ButterflyRotation(RowMap):
    """x ← x (I + D_n) … (I + D_1), each D of blocks in its own order (BOFT)."""

    blocks: Tensor  # [n_factors, n_blocks, k, k]
    orders: Tensor  # int32 [n_factors, in_features]: D_i mixes x[orders[i]] block by block

    def apply(self, x: Tensor) -> Tensor:
        for blocks, order in zip(self.blocks.flip(0), self.orders.long().flip(0), strict=True):
            mixed = _blockwise(x[:, order], blocks)
            x = x.index_add(1, order, mixed)
        return x


@dataclass(frozen=True, slots=True)
class PairRotation(RowMap):
    """Rotates and scales outputs i and j = i + k/2 of each group of k together (ROAD).

    y[i] ← (1 + own[i]) y[i] − other[i] y[j],   y[j] ← (1 + own[j]) y[j] + other[j] y[i]
    """

    own: Tensor  # [out_features]: α cos θ − 1
    other: Tensor  # [out_features]: α sin θ
    group_size: int

    def apply(self, x: Tensor) -> Tensor:
        first, second = x.reshape(x.shape[0], -1, 2, self.group_size // 2).unbind(dim=2)
        turned = torch.stack((-second, first), dim=2).flatten(1)
        return x + x * self.own.to(x.dtype) + turned * self.other.to(x.dtype)


def _blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply x [n_rows, n_blocks·k] by a block-diagonal matrix."""
    cut = x.reshape(x.shape[0], -1, blocks.shape[1]).transpose(0, 1)
    return (cut @ blocks.to(x.dtype)).transpose(0, 1).flatten(1)


def operator_name(operator: Operator) -> str:
    """Return the name in words: "block rotation" for ``BlockRotation``."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", type(operator).__name__).lower()


_ALL: tuple[type[Operator], ...] = (
    *(Circulant, DenseDelta, FourierDelta, Kronecker, MaskedWeight, SparseDelta, SumDelta),
    *(BlockRotation, ButterflyRotation, PairRotation),
)
OPERATORS: Mapping[str, type[Operator]] = {cls.__name__: cls for cls in _ALL}
