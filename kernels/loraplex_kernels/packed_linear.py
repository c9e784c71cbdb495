"""Frozen linears of the base model, stacked and packed once for the machine they run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PackedLinear"]


class PackedLinear:
    """One or several linears that read the same input (q,k,v or gate,up), as one product.

    Holds its own copy of the weights, so the caller may drop the originals. A row's result has the
    same bits whatever rows stand beside it where the native kernel runs.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        self.in_features = weights[0].shape[1]
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.n_out = sum(self.out_features)
        self.bias = _stack_biases(weights, biases)
        self._stacked = torch.cat([weight.detach() for weight in weights])  # [n_out, in_features]

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, in_features] → [T, n_out]."""
        return functional.linear(x, self._stacked, self.bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Writes the product to ``out`` [T, n_out], whose rows may be strided."""
        out.copy_(self(x))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows ``token_ids`` [T] of the weight, so that a tied head is held once."""
        return self._stacked[token_ids]

    def unpack(self) -> list[Tensor]:
        """The weights as they were given, copied."""
        return [part.clone() for part in torch.split(self._stacked, list(self.out_features))]

    @property
    def n_bytes(self) -> int:
        return self._stacked.nbytes


def _stack_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if len(weights) != len(biases):
        raise ValueError(f"{len(weights)} weights but {len(biases)} biases; give None for absent")
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
            for weight, bias in zip(weights, biases, strict=True)
        ]
    )
