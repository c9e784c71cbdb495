"""The experts of a mixture on a CPU: each row goes through the gated MLPs that it chose."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.cpu.model_ops import dtype_code, native_ops

from .base_linear import BaseLinear

_LANES = 16  # widths must be multiples


class GatedExperts:
    """y = Σ_e w_e · W_down^e (silu(W_gate^e x) ⊙ W_up^e x), over the experts e of each row.

    An expert's weights are read once for all its rows. A row has the same bits in every batch: sums
    over experts are float32, in the order of the row's choices. Nothing is recorded for autograd.
    """

    def __init__(self, gate_up: Sequence[BaseLinear], down: Sequence[BaseLinear]) -> None:
        """The products of each expert, [2 · width, hidden] and [hidden, width]; see ``takes``."""
        self._linears = (*gate_up, *down)  # keeps their memory
        self._hidden, self._width = gate_up[0].in_features, down[0].in_features
        self._n_experts, self._dtype = len(gate_up), gate_up[0].dtype
        code = dtype_code(self._dtype)
        assert code is not None
        self._code = code
        self._gate_up, self._down = _addresses(gate_up), _addresses(down)

    @staticmethod
    def takes(gate_up: Sequence[BaseLinear], down: Sequence[BaseLinear]) -> bool:
        """Return True if native code can run these products."""
        return (
            all(linear.native is not None and linear.bias is None for linear in (*gate_up, *down))
            and gate_up[0].in_features % _LANES == 0
            and down[0].in_features % _LANES == 0
        )

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Map rows [n, hidden] by their experts [n, k], weighted by [n, k]. Raises IndexError."""
        n_rows, k = index.shape
        x = x.contiguous()
        index = index.to(torch.int32).contiguous()
        weights = weights.to(torch.float32).contiguous()
        if x.dtype is not self._dtype or x.shape != (n_rows, self._hidden):
            raise ValueError(
                f"needs {self._dtype} rows [{n_rows}, {self._hidden}]; got {x.dtype} "
                f"{tuple(x.shape)}"
            )
        out = torch.empty_like(x)
        if n_rows == 0:
            return out
        if int(index.min()) < 0 or int(index.max()) >= self._n_experts:
            raise IndexError(f"experts are 0 to {self._n_experts - 1}; got {int(index.max())}")
        native_ops(keep_gil=False).experts(
            self._code,
            x.data_ptr(),
            n_rows,
            self._hidden,
            self._width,
            self._n_experts,
            k,
            self._gate_up,
            self._down,
            index.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
        )
        return out


def _addresses(linears: Sequence[BaseLinear]) -> "ctypes.Array[ctypes.c_void_p]":
    found = [linear.native.address for linear in linears if linear.native is not None]
    return (ctypes.c_void_p * len(found))(*found)
