"""The product by weights that native code has packed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu.blocks import PANEL
from loraplex_kernels.cpu.lora import NativeWeights
from loraplex_kernels.cpu.model_ops import dtype_code, native_ops

_LIGHT_BYTES = 8 << 20  # weights that take less than a fifth of a millisecond to read
_LIGHT_PRODUCTS = 1 << 26


class NativeProduct:
    """x Wᵀ + b in native code. Keeps neither the weights nor the bias alive."""

    def __init__(
        self, address: int, n_bytes: int, bias: Tensor | None, shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """``address``: of the panels, plus what says their layout. ``n_bytes``: of the weights.

        ``bias``: float32, padded to full panels. ``shape``: [n_out, in_features]. ``dtype``: of x
        and the outputs.
        """
        self._n_out, self._in_features = shape
        self._dtype = dtype
        code = dtype_code(dtype)
        assert code is not None
        self._code = code
        self.weights = NativeWeights(
            address,
            0 if bias is None else bias.data_ptr(),
            _LIGHT_PRODUCTS // (shape[0] * shape[1]) if n_bytes <= _LIGHT_BYTES else 0,
        )

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the product to ``out`` [T, n_out]. Rows of ``x`` and ``out`` may be strided."""
        n_rows, in_features = x.shape
        x_stride, x_unit = x.stride()
        out_stride, out_unit = out.stride()
        if (
            in_features != self._in_features
            or out.shape != (n_rows, self._n_out)
            or x.dtype is not self._dtype
            or out.dtype is not self._dtype
            or (x_unit, out_unit) != (1, 1)
        ):
            self._refuse(x, out)
        weights = self.weights
        native_ops(keep_gil=n_rows <= weights.light_rows).linear(
            self._code,
            x.data_ptr(),
            x_stride,
            weights.address,
            weights.bias_address,
            out.data_ptr(),
            out_stride,
            n_rows,
            self._n_out,
            in_features,
        )

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        """Do as ``BaseLinear.argmax``, without storing outputs: faster for 50,000 of them."""
        n_rows, in_features = x.shape
        if in_features != self._in_features or x.dtype is not self._dtype or x.stride(1) != 1:
            self._refuse(x, x)
        places = torch.empty(n_rows, dtype=torch.int64)
        weights = self.weights
        native_ops(keep_gil=n_rows <= weights.light_rows).linear_argmax(
            self._code,
            x.data_ptr(),
            x.stride(0),
            weights.address,
            weights.bias_address,
            n_rows,
            self._n_out,
            in_features,
            None if masks is None else masks.ctypes.data,
            0 if masks is None else masks.shape[1],
            places.data_ptr(),
        )
        return places

    def _refuse(self, x: Tensor, out: Tensor) -> None:
        raise ValueError(
            f"needs {self._dtype} rows [T, {self._in_features}] → [T, {self._n_out}] with unit"
            f" column stride; got {x.dtype} {tuple(x.shape)} {x.stride()} → {out.dtype}"
            f" {tuple(out.shape)} {out.stride()}"
        )


def pad_panels(rows: Tensor) -> Tensor:
    """Return ``rows`` [n, …] with zeros behind, so that they fill panels."""
    missing = -rows.shape[0] % PANEL
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))])
