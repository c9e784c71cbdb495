"""Frozen linears of the base model, stacked and packed once for the machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.cpu.exponent_coding import (
    EXPONENT_CODED,
    coded_starts,
    decode_outputs,
    encode_panels,
)
from loraplex_kernels.cpu.lora import NativeWeights
from loraplex_kernels.cpu.model_ops import dtype_code, native_ops
from loraplex_kernels.formats.storage import WeightRange

from .base_linear import BaseLinear, part_of, stack_biases

_PANEL = 32  # outputs side by side, as in csrc/layers/linear.inc
_LIGHT_BYTES = 8 << 20  # weights that take less than a fifth of a millisecond to read
_LIGHT_PRODUCTS = 1 << 26
_TEMPORARY_BYTES = 8 << 20  # panels that are packed at once: this much, or
_TEMPORARY_SHARE = 50  # a fiftieth of all weights


class PackedLinear(BaseLinear):
    """Linears with weights of a floating-point dtype.

    Holds a copy of the weights, so the caller may drop the originals. On a GPU a single weight is
    not copied. In native code (float32 and bfloat16 on a CPU) sums are float32 and run over the
    input from left to right, so a row has the same bits in every batch. Elsewhere
    ``torch.nn.functional.linear`` runs. Nothing is recorded for autograd.

    ``exponent_coding``: store a weight in twelve bits where that pays. No result changes.
    ``memory``: the memory for native code's copy, at most ``packed_words`` words of it.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        exponent_coding: bool = True,
        memory: WeightRange | None = None,
    ) -> None:
        out_features = [weight.shape[0] for weight in weights]
        super().__init__(out_features, weights[0].shape[1], weights[0].dtype)
        self._unit = 2 if self.dtype.itemsize == 2 else 1  # elements of a 32-bit word
        self._code = dtype_code(self.dtype) if weights[0].is_cpu else None
        if self.in_features % self._unit != 0:
            self._code = None
        bias = stack_biases(self.out_features, biases)
        self._is_coded = False
        if self._code is None:
            self._weight, self._bias = _stack(weights), bias
        else:
            self._bias = None if bias is None else _pad(bias.float())
            memory = memory or WeightRange(
                packed_words(self.out_features, self.in_features, self.dtype)
            )
            self._weight = self._pack(
                _Panels(weights, self._unit, memory.n_bytes // _TEMPORARY_SHARE),
                memory,
                exponent_coding=exponent_coding and self.dtype is torch.bfloat16,
            )
        if self._code is not None:
            self.native = self._describe()

    def __call__(self, x: Tensor) -> Tensor:
        if self._code is None:
            return functional.linear(x, self._weight, self._bias)
        return super().__call__(x)

    def into(self, x: Tensor, out: Tensor) -> None:
        native = self.native
        if native is None:
            _multiply(x, self._weight, self._bias, out)
            return
        n_rows, in_features = x.shape
        x_stride, x_unit = x.stride()
        out_stride, out_unit = out.stride()
        if (
            in_features != self.in_features
            or out.shape != (n_rows, self.n_out)
            or x.dtype is not self.dtype
            or out.dtype is not self.dtype
            or (x_unit, out_unit) != (1, 1)
        ):
            self._refuse(x, out)
        native_ops(keep_gil=n_rows <= native.light_rows).linear(
            self._code,
            x.data_ptr(),
            x_stride,
            native.address,
            native.bias_address,
            out.data_ptr(),
            out_stride,
            n_rows,
            self.n_out,
            in_features,
        )

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        outputs = part_of(self.out_features, index)
        if self._code is None:
            bias = None if self._bias is None else self._bias[outputs]
            _multiply(x, self._weight[outputs], bias, out)
        else:
            out.copy_(self(x)[:, outputs])

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        """Native code stores no outputs, which is faster for a head of 50,000 rows."""
        native = self.native
        if native is None:
            return super().argmax(x, masks)
        n_rows, in_features = x.shape
        if in_features != self.in_features or x.dtype is not self.dtype or x.stride(1) != 1:
            self._refuse(x, x)
        places = torch.empty(n_rows, dtype=torch.int64)
        native_ops(keep_gil=n_rows <= native.light_rows).linear_argmax(
            self._code,
            x.data_ptr(),
            x.stride(0),
            native.address,
            native.bias_address,
            n_rows,
            self.n_out,
            in_features,
            None if masks is None else masks.ctypes.data,
            0 if masks is None else masks.shape[1],
            places.data_ptr(),
        )
        return places

    def embed(self, token_ids: Tensor) -> Tensor:
        if self._code is None:
            return self._weight[token_ids]
        if self._is_coded:
            return decode_outputs(self._weight, self.in_features // self._unit, token_ids)
        return self._weight[token_ids // _PANEL, :, token_ids % _PANEL].view(self.dtype)

    def matrix(self) -> Tensor:
        return self._weight if self._code is None else super().matrix()

    def part(self, index: int) -> Tensor:
        if self._code is None:
            return self._weight[part_of(self.out_features, index)]
        return super().part(index)

    def _pack(self, panels: _Panels, memory: WeightRange, *, exponent_coding: bool) -> Tensor:
        """Pack into ``memory`` without an intermediate copy."""
        shape = (panels.n_panels, panels.n_words)
        starts = coded_starts(panels, *shape) if exponent_coding else None
        if starts is not None:
            self._is_coded = True
            weight = memory.take(int(starts[-1]) // 4)
            encode_panels(panels, starts, weight)
            return weight
        weight = memory.take(panels.n_panels * panels.n_words * _PANEL).view(*shape, _PANEL)
        first = 0
        for part in panels:
            weight[first : first + part.shape[0]] = part
            first += part.shape[0]
        return weight

    def _describe(self) -> NativeWeights:
        light = self._weight.nbytes <= _LIGHT_BYTES
        return NativeWeights(
            self._weight.data_ptr() + (EXPONENT_CODED if self._is_coded else 0),
            0 if self._bias is None else self._bias.data_ptr(),
            _LIGHT_PRODUCTS // (self.n_out * self.in_features) if light else 0,
        )

    @property
    def n_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def _refuse(self, x: Tensor, out: Tensor) -> None:
        raise ValueError(
            f"needs {self.dtype} rows [T, {self.in_features}] → [T, {self.n_out}] with unit column"
            f" stride; got {x.dtype} {tuple(x.shape)} {x.stride()} → {out.dtype} {tuple(out.shape)}"
            f" {out.stride()}"
        )


def packed_words(out_features: Sequence[int], in_features: int, dtype: torch.dtype) -> int:
    """Return the most 32-bit words of a ``WeightRange`` that a linear takes."""
    n_panels = -(-sum(out_features) // _PANEL)
    return WeightRange.words_of(n_panels * _PANEL * in_features * dtype.itemsize // 4)


class _Panels:
    """The weights cut into panels: words int32 [n, K / unit, 32]. Rows beyond n_out are zero.

    Each iteration packs again, unless there are few panels: a temporary copy of a large head would
    set the memory peak of a load.
    """

    def __init__(self, weights: Sequence[Tensor], unit: int, temporary_bytes: int) -> None:
        self._weights, self._unit = weights, unit
        n_bytes = max(_TEMPORARY_BYTES, temporary_bytes)
        self.n_words = weights[0].shape[1] // unit
        self.n_panels = -(-sum(weight.shape[0] for weight in weights) // _PANEL)
        self._at_once = max(1, n_bytes // (self.n_words * _PANEL * 4))
        self._all = self._pack(0) if self.n_panels <= self._at_once else None

    def __iter__(self) -> Iterator[Tensor]:
        if self._all is not None:
            yield self._all
            return
        for first in range(0, self.n_panels, self._at_once):
            yield self._pack(first)

    def _pack(self, first_panel: int) -> Tensor:
        first, end = first_panel * _PANEL, (first_panel + self._at_once) * _PANEL
        parts, start = [], 0
        for weight in self._weights:
            n_rows = weight.shape[0]
            part = weight.detach()[max(0, first - start) : max(0, min(n_rows, end - start))]
            parts += [part] if part.shape[0] else []
            start += n_rows
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        words = _pad(rows.contiguous()).view(torch.int32)
        return words.view(-1, _PANEL, self.n_words).transpose(1, 2).contiguous()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``x`` Wᵀ + ``bias`` to ``out`` [T, n_out] by torch. Rows may be strided."""
    if not x.is_cuda:
        out.copy_(functional.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _stack(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()


def _pad(rows: Tensor) -> Tensor:
    missing = -rows.shape[0] % _PANEL
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))])
