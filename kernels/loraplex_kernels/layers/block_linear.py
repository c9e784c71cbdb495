"""Frozen linears of the base in the blocks of a GGUF file, the counterpart of ``PackedLinear``."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu.blocks import (
    IN_BLOCKS,
    PANEL,
    BlockRows,
    pack_blocks,
    read_blocks,
    takes_blocks,
)
from loraplex_kernels.cpu.gguf_weight import GgufWeight
from loraplex_kernels.cpu.model_ops import dtype_code

from .base_linear import BaseLinear, part_of, stack_biases
from .native_product import NativeProduct, pad_panels
from .packed_linear import PackedLinear


class BlockLinear(BaseLinear):
    """Linears whose weights stay in blocks, each in its own type.

    In bfloat16 native code rounds each 32 inputs of a row to eight bits, scaled by the largest of
    them, and computes the rest in integers and float32. In float32 it rounds nothing. A row has the
    same bits in every batch. The weights that are read are dequantised. Nothing is recorded for
    autograd.
    """

    def __init__(self, weights: Sequence[GgufWeight], biases: Sequence[Tensor | None]) -> None:
        """``takes`` must be true of the weights. Copies them in another order."""
        out_features = [weight.shape[0] for weight in weights]
        super().__init__(out_features, weights[0].shape[1], weights[0].dtype)
        bias = stack_biases(self.out_features, biases)
        self._bias = None if bias is None else pad_panels(bias.float())
        self._packed = pack_blocks(_runs(weights), self.in_features)
        self._product = NativeProduct(
            self._packed.data_ptr() + IN_BLOCKS,
            self._packed.nbytes,
            self._bias,
            (self.n_out, self.in_features),
            self.dtype,
        )
        self.native = self._product.weights

    @staticmethod
    def takes(weights: Sequence[GgufWeight]) -> bool:
        """Return True if native code can multiply by these weights here, stacked.

        Rows of a panel have one type, so a type may only change at a multiple of 32 outputs.
        """
        return (
            dtype_code(weights[0].dtype) is not None
            and all(takes_blocks(w.type.number, w.shape[1]) for w in weights)
            and all(part.rows.shape[0] % PANEL == 0 for part in _runs(weights)[:-1])
        )

    def into(self, x: Tensor, out: Tensor) -> None:
        self._product.into(x, out)

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        out.copy_(self(x)[:, part_of(self.out_features, index)])

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        return self._product.argmax(x, masks)

    def embed(self, token_ids: Tensor) -> Tensor:
        return read_blocks(self._packed, self.in_features, token_ids).to(self.dtype)

    @property
    def n_bytes(self) -> int:
        return self._packed.nbytes + (0 if self._bias is None else self._bias.nbytes)


def block_linear(weights: Sequence[GgufWeight], biases: Sequence[Tensor | None]) -> BaseLinear:
    """Return one product of linears that read the same input.

    Weights that native code does not take here are dequantised for good.
    """
    if BlockLinear.takes(weights):
        return BlockLinear(weights, biases)
    return PackedLinear([weight.dequantize() for weight in weights], biases)


def _runs(weights: Sequence[GgufWeight]) -> list[BlockRows]:
    """Return the rows of neighbours that have the same type, joined."""
    runs: list[BlockRows] = []
    for weight in weights:
        rows = weight.rows
        if runs and runs[-1].format == weight.type.number:
            rows = torch.cat([runs.pop().rows, rows])
        runs.append(BlockRows(weight.type.number, rows.contiguous()))
    return runs
