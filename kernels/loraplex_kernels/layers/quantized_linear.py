"""Frozen linears of the base with quantised weights, the counterpart of ``PackedLinear``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.cpu.code_blocks import as_blocks
from loraplex_kernels.formats.quantized_weight import QuantizedWeight

from .base_linear import BaseLinear, part_of, stack_biases
from .block_linear import block_linear
from .packed_linear import PackedLinear

_REFERENCE_BYTES = 4 << 20  # dequantised rows that exist at the same time
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedLinear(BaseLinear):
    """Linears with quantised weights. The weights it returns are dequantised.

    Only codes and scales are stored. On a GPU a Triton kernel runs, elsewhere the reference.
    Nothing is recorded for autograd.
    """

    def __init__(self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> None:
        """Raises ValueError if the weights differ in format, group size or dtype."""
        stacked = QuantizedWeight.stack(weights)
        out_features = [weight.shape[0] for weight in weights]
        super().__init__(out_features, stacked.in_features, stacked.dtype)
        self.format = stacked.format
        bias = stack_biases(self.out_features, biases)
        self._bias = None if bias is None else bias.to(stacked.device)
        self._weight = stacked

    def into(self, x: Tensor, out: Tensor) -> None:
        n_rows = x.shape[0]
        if (
            x.shape != (n_rows, self.in_features)
            or out.shape != (n_rows, self.n_out)
            or x.dtype is not self.dtype
            or out.dtype is not self.dtype
            or out.stride(1) != 1
        ):
            raise ValueError(
                f"needs {self.dtype} rows [T, {self.in_features}] → [T, {self.n_out}] with "
                f"contiguous columns; got {x.dtype} {tuple(x.shape)} → {out.dtype} "
                f"{tuple(out.shape)} with strides {out.stride()}"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        quantized_linear(x, self._weight, self._bias, out=out)

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        outputs = part_of(self.out_features, index)
        bias = None if self._bias is None else self._bias[outputs]
        quantized_linear(x, self._weight.part(outputs), bias, out=out)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._weight.rows(token_ids.to(self._weight.device))

    @property
    def n_bytes(self) -> int:
        return self._weight.n_bytes + (0 if self._bias is None else self._bias.nbytes)


def coded_linear(weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> BaseLinear:
    """Return one product of quantised linears that read the same input, the fastest of the device.

    On a CPU the weights become blocks of GGUF. Weights that have none are dequantised for good.
    Raises ValueError if the weights differ in format, group size or dtype.
    """
    if weights[0].device.type != "cpu":
        return QuantizedLinear(weights, biases)
    blocks = [block for block in map(as_blocks, weights) if block is not None]
    if len(blocks) == len(weights):
        return block_linear(blocks, biases)
    return PackedLinear([weight.dequantize() for weight in weights], biases)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, out: Tensor
) -> None:
    """Write ``x`` [T, in_features] Wᵀ + ``bias`` to ``out`` [T, n_out] by the fastest version."""
    if x.is_cuda and x.dtype in _TRITON_DTYPES:
        from loraplex_kernels.triton.quantized_linear import quantized_linear_triton

        quantized_linear_triton(x, weight, bias, out=out)
    else:
        quantized_linear_reference(x, weight, bias, out=out)


def quantized_linear_reference(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, out: Tensor
) -> None:
    """The definition: torch's product by the dequantised weight, a few outputs at a time."""
    at_once = max(1, _REFERENCE_BYTES // (weight.in_features * weight.dtype.itemsize))
    for first in range(0, weight.shape[0], at_once):
        outputs = slice(first, first + at_once)
        part = None if bias is None else bias[outputs]
        out[:, outputs] = functional.linear(x, weight.rows(outputs), part)
