"""Full-rank updates, each kept in its smallest form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from .contract import BaseProduct, Delta

__all__ = [
    "Circulant",
    "DenseDelta",
    "FourierDelta",
    "Kronecker",
    "MaskedWeight",
    "SparseDelta",
    "SumDelta",
]


@dataclass(frozen=True, slots=True)
class DenseDelta(Delta):
    """Δ x for a Δ of no form at all. As large as the weight itself: the last resort."""

    weight: Tensor  # [out_features, in_features]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))

    def n_products(self, in_features: int, out_features: int) -> int:
        return self.weight.numel()

    def scaled(self, weight: float) -> Self:
        return replace(self, weight=self.weight * weight)


@dataclass(frozen=True, slots=True)
class Kronecker(Delta):
    """left ⊗ right (LoKr): [a·b, c·d] from [a, c] and [b, d]."""

    left: Tensor  # [a, c]
    right: Tensor  # [b, d]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        grid = x.reshape(-1, left.shape[1], right.shape[1])
        return (left @ (grid @ right.t())).flatten(1)

    def n_products(self, in_features: int, out_features: int) -> int:
        (a, c), b = self.left.shape, self.right.shape[0]
        return c * self.right.numel() + a * c * b

    def scaled(self, weight: float) -> Self:
        return replace(self, left=self.left * weight)


@dataclass(frozen=True, slots=True)
class Circulant(Delta):
    """Circulant blocks of b × b (C3A), multiplied as spectra in float32.

    ΔW[m·b + i, n·b + j] = kernel[m, n, (j − i) mod b].
    """

    kernel: Tensor  # [n_out_blocks, n_in_blocks, b]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        _, n_blocks, size = self.kernel.shape
        blocks = torch.fft.ifft(x.float().reshape(-1, n_blocks, size))
        mixed = torch.einsum("tnb,mnb->tmb", blocks, torch.fft.fft(self.kernel.float()))
        delta: Tensor = torch.fft.fft(mixed).real.flatten(1)
        return delta.to(x.dtype)

    def n_products(self, in_features: int, out_features: int) -> int:
        n_out, n_in, size = self.kernel.shape
        return 4 * self.kernel.numel() + (n_out * n_in + n_out + n_in) * _fft_products(size)

    def scaled(self, weight: float) -> Self:
        return replace(self, kernel=self.kernel * weight)


@dataclass(frozen=True, slots=True)
class SparseDelta(Delta):
    """Some entries of ΔW (SHiRA, SuperTuning, WaveFT), added up in float32."""

    places: Tensor  # int32 [2, n_entries]: rows, columns; each place once, in order
    values: Tensor  # [n_entries]
    out_features: int

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        size = (self.out_features, x.shape[1])
        delta = torch.sparse_coo_tensor(
            self.places.long(), self.values.float(), size, is_coalesced=True, check_invariants=False
        )
        added: Tensor = torch.sparse.mm(delta, x.float().t()).t()
        return added.to(x.dtype)

    def n_products(self, in_features: int, out_features: int) -> int:
        return self.values.numel()

    def scaled(self, weight: float) -> Self:
        return replace(self, values=self.values * weight)


@dataclass(frozen=True, slots=True)
class FourierDelta(Delta):
    """Re(ifft2(S)) of a sparse S [out, in] (FourierFT) in float32, without forming it."""

    places: Tensor  # int32 [2, n_entries]: rows, columns of S
    values: Tensor  # [n_entries]
    out_features: int

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        rows, columns = self.places.long()
        waves = torch.fft.ifft(x.float())[:, columns] * self.values.float()
        spectrum = waves.new_zeros(x.shape[0], self.out_features).index_add_(1, rows, waves)
        delta: Tensor = torch.fft.ifft(spectrum).real
        return delta.to(x.dtype)

    def n_products(self, in_features: int, out_features: int) -> int:
        return 2 * self.values.numel() + _fft_products(in_features) + _fft_products(out_features)

    def scaled(self, weight: float) -> Self:
        return replace(self, values=self.values * weight)


@dataclass(frozen=True, slots=True)
class MaskedWeight(Delta):
    """W ⊙ (B A) (HiRA, GLoRA), entry by entry: Σ_ρ diag(b_ρ) W diag(a_ρ).

    That is one product with the base for each of the r ranks, and no copy of W.
    """

    a: Tensor  # [r, in_features]
    b: Tensor  # [out_features, r]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        rank = self.a.shape[0]
        masked = (x.unsqueeze(1) * self.a.to(x.dtype)).flatten(0, 1)  # [n_rows·r, in]
        products = product(masked).view(x.shape[0], rank, -1)
        return torch.einsum("trm,mr->tm", products, self.b.to(products.dtype)).to(x.dtype)

    def n_products(self, in_features: int, out_features: int) -> int:
        return self.a.shape[0] * (in_features * out_features + in_features + out_features)

    def scaled(self, weight: float) -> Self:
        return replace(self, b=self.b * weight)


@dataclass(frozen=True, slots=True)
class SumDelta(Delta):
    """Those of the parts of a mixture."""

    parts: tuple[Delta, ...]

    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        total = self.parts[0].apply(x, product)
        for part in self.parts[1:]:
            total = total + part.apply(x, product)
        return total

    @property
    def acts(self) -> bool:
        return any(part.acts for part in self.parts)

    def tensors(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.tensors()

    def n_products(self, in_features: int, out_features: int) -> int:
        return sum(part.n_products(in_features, out_features) for part in self.parts)

    def scaled(self, weight: float) -> Self:
        return replace(self, parts=tuple(part.scaled(weight) for part in self.parts))


def _fft_products(size: int) -> int:
    return 4 * size * max(1, size.bit_length())
