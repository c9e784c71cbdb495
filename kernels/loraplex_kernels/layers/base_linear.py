"""Defines the class that every form of the base's frozen linears shares."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu.lora import NativeWeights
from loraplex_kernels.cpu.token_mask import mask_bits


class BaseLinear(ABC):
    """The product of linears that read the same input (q,k,v; gate,up; or one linear)."""

    native: NativeWeights | None = None
    """The weights as native code reads them; None if they are not in its layout."""

    def __init__(self, out_features: Sequence[int], in_features: int, dtype: torch.dtype) -> None:
        self.out_features, self.in_features, self.dtype = tuple(out_features), in_features, dtype
        self.n_out = sum(out_features)
        self._bias: Tensor | None = None  # of all linears; native code's is padded

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, in_features] → [T, n_out]."""
        out = torch.empty((x.shape[0], self.n_out), dtype=x.dtype, device=x.device)
        self.into(x, out)
        return out

    @abstractmethod
    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the product to ``out`` [T, n_out]. Rows of ``x`` and ``out`` may be strided."""

    @abstractmethod
    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        """Write the product of linear ``index`` alone to ``out`` [T, its out_features].

        A GPU reads only its weights. Native code computes the other linears, too.
        """

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        """Return the index of each row's largest output, int64 [T]; of equal outputs the first.

        ``masks`` [T, ceil(n_out / 32)] selects the outputs that count, see ``token_mask``. If none
        of them is above minus infinity, the index is n_out or one of them.
        """
        values = self(x).float().cpu().numpy()  # torch promises nothing about equal values
        if masks is not None:
            values = np.where(mask_bits(masks, values.shape[1]), values, -np.inf)
        best: NDArray[np.int64] = values.argmax(-1)
        if masks is not None:
            best[values.max(-1) == -np.inf] = values.shape[1]
        return torch.from_numpy(best)

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Return rows ``token_ids`` int64 [T] of the weight, so that a tied head is stored once."""

    @property
    def bias(self) -> Tensor | None:
        """The biases [n_out], or None if no stacked linear has one."""
        return None if self._bias is None else self._bias[: self.n_out]

    def matrix(self) -> Tensor:
        """Return all weights stacked, [n_out, in_features]. Do not write to it."""
        return self.embed(torch.arange(self.n_out))

    def part(self, index: int) -> Tensor:
        """Return weight ``index`` on its device. Do not write to it."""
        outputs = part_of(self.out_features, index)
        return self.embed(torch.arange(outputs.start, outputs.stop))

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """The bytes of the weights and the bias."""


def part_of(out_features: Sequence[int], index: int) -> slice:
    """Return the slice of linear ``index`` among all outputs."""
    first = sum(out_features[:index])
    return slice(first, first + out_features[index])


def stack_biases(out_features: Sequence[int], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Return the biases stacked, zeros for absent ones; None if all are absent."""
    if len(out_features) != len(biases):
        raise ValueError(
            f"{len(out_features)} weights but {len(biases)} biases; give None for absent"
        )
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    return torch.cat(
        [
            present.new_zeros(n_out) if bias is None else bias.detach()
            for n_out, bias in zip(out_features, biases, strict=True)
        ]
    )
