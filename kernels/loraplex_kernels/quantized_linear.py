"""Frozen linears of the base with quantised weights: what ``PackedLinear`` is for plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.cpu.lora import NativeWeights

from .packed_linear import PackedLinear, best_outputs, part_of, stack_biases
from .quantized_panels import PANEL, QuantizedPanels
from .quantized_weight import QuantizedWeight

__all__ = ["BaseLinear", "QuantizedLinear", "quantized_linear", "quantized_linear_reference"]

_REFERENCE_BYTES = 4 << 20  # of dequantised rows that exist at once
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedLinear:
    """One or several linears that read the same input, as one product by their dequantised weights.

    Only codes and scales are held. On a CPU native code multiplies in float32 and bfloat16: a row
    has the bits that ``PackedLinear`` of the dequantised weights gives it, in any company. On a GPU
    it is a Triton kernel, elsewhere the reference. For inference: nothing is recorded for autograd.
    """

    def __init__(self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> None:
        """Raises ValueError if the weights differ in format, group size or dtype."""
        stacked = QuantizedWeight.stack(weights)
        self.in_features = stacked.in_features
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.n_out = sum(self.out_features)
        self.dtype = stacked.dtype
        self.format = stacked.format
        bias = stack_biases(self.out_features, biases)
        self._bias = None if bias is None else bias.to(stacked.device)
        self._weight: QuantizedWeight | QuantizedPanels = stacked
        if QuantizedPanels.takes(stacked):
            self._weight = QuantizedPanels(stacked)
            missing = -self.n_out % PANEL
            self._bias = None if bias is None else functional.pad(bias.float(), (0, missing))

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [T, in_features] → [T, n_out]."""
        out = torch.empty((x.shape[0], self.n_out), dtype=x.dtype, device=x.device)
        self.into(x, out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """Writes the product to ``out`` [T, n_out]; ``x`` may be strided, rows of ``out``, too."""
        n_rows = x.shape[0]
        if (
            x.shape != (n_rows, self.in_features)
            or out.shape != (n_rows, self.n_out)
            or x.dtype is not self.dtype
            or out.dtype is not self.dtype
            or out.stride(1) != 1
        ):
            raise ValueError(
                f"needs {self.dtype} rows [T, {self.in_features}] → [T, {self.n_out}] whose "
                f"columns lie side by side; got {x.dtype} {tuple(x.shape)} → {out.dtype} "
                f"{tuple(out.shape)} with strides {out.stride()}"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        if isinstance(self._weight, QuantizedPanels):
            self._weight.into(x, self._bias, out)
        else:
            quantized_linear(x, self._weight, self._bias, out=out)

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        """As ``PackedLinear.into_part``."""
        outputs = part_of(self.out_features, index)
        if isinstance(self._weight, QuantizedPanels):
            out.copy_(self(x)[:, outputs])
        else:
            bias = None if self._bias is None else self._bias[outputs]
            quantized_linear(x, self._weight.part(outputs), bias, out=out)

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        """As ``PackedLinear.argmax``."""
        return best_outputs(self(x), masks)

    @property
    def native(self) -> NativeWeights | None:
        """None: native code that reads weights for itself does not know codes."""
        return None

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows ``token_ids`` int64 [T] of the dequantised weights."""
        return self._weight.rows(token_ids)

    @property
    def bias(self) -> Tensor | None:
        """[n_out], or None if no stacked linear has one."""
        return None if self._bias is None else self._bias[: self.n_out]

    def matrix(self) -> Tensor:
        """[n_out, in_features]: all weights stacked, dequantised for the caller."""
        return self._rows(0, self.n_out)

    def part(self, index: int) -> Tensor:
        """Weight ``index``, dequantised for the caller."""
        outputs = part_of(self.out_features, index)
        return self._rows(outputs.start, outputs.stop)

    def unpack(self) -> list[Tensor]:
        """All weights, dequantised for the caller."""
        return [self.part(i) for i in range(len(self.out_features))]

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return self._weight.n_bytes + (0 if self._bias is None else self._bias.nbytes)

    def _rows(self, first: int, end: int) -> Tensor:
        return self._weight.rows(torch.arange(first, end, device=self._weight.device))


BaseLinear: TypeAlias = PackedLinear | QuantizedLinear


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, out: Tensor
) -> None:
    """``out`` [T, n_out] = ``x`` [T, in_features] Wᵀ + ``bias``, by the fastest version here."""
    if x.is_cuda and x.dtype in _TRITON_DTYPES:
        from .triton import quantized_linear_triton

        quantized_linear_triton(x, weight, bias, out=out)
    else:
        quantized_linear_reference(x, weight, bias, out=out)


def quantized_linear_reference(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, out: Tensor
) -> None:
    """The definition: torch's product by the dequantised weight, some outputs at a time."""
    at_once = max(1, _REFERENCE_BYTES // (weight.in_features * weight.dtype.itemsize))
    for first in range(0, weight.shape[0], at_once):
        outputs = slice(first, first + at_once)
        part = None if bias is None else bias[outputs]
        out[:, outputs] = functional.linear(x, weight.rows(outputs), part)
