"""The output head whose tokens are spread over the ranks: rank 0 asks, all compute, it gathers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.packed_linear import PackedLinear
from loraplex_kernels.quantized_linear import BaseLinear

from .tensor_parallel import Shard

__all__ = ["GatheredHead"]


class GatheredHead(PackedLinear):
    """A ``PackedLinear`` for those who call it on rank 0; the weight of each rank is its own.

    A subclass, since runner and head know no other kind of linear: all that reads weights or
    native code here is refused or says that there is none.
    """

    def __init__(self, own: BaseLinear, shard: Shard) -> None:
        """``own``: this rank's tokens."""
        self.in_features = own.in_features
        self.out_features = (shard.layout.vocab_size,)
        self.n_out = shard.layout.vocab_size
        self.dtype = own.dtype
        self._own, self._shard = own, shard

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, in_features] → [T, n_out]. Rank 0."""
        out = x.new_empty((x.shape[0], self.n_out))
        self.into(x, out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """As of ``PackedLinear``. Rank 0."""
        others = self._shard.others
        if others is None:
            raise RuntimeError("only rank 0 asks for logits")
        rows = x.contiguous()
        with others.head(rows):
            parts = self.compute(rows)
        out.copy_(torch.cat(parts, dim=1)[:, : self.n_out])

    def compute(self, x: Tensor) -> list[Tensor]:
        """This rank's share, with ``x`` [T, in_features] of rank 0. All ranks."""
        collective, width = self._shard.collective, self._shard.layout.tokens_of_a_rank
        collective.broadcast(x)
        own = self._own(x)
        return collective.gather(functional.pad(own, (0, width - own.shape[1])).contiguous())

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        raise RuntimeError("the tokens are chosen from gathered logits")

    @property
    def native(self) -> None:
        return None

    @property
    def bias(self) -> None:
        return None

    @property
    def n_bytes(self) -> int:
        return self._own.n_bytes
