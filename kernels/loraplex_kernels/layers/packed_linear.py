"""Frozen linears of the base model, stacked and packed once for the machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.cpu.blocks import PANEL
from loraplex_kernels.cpu.exponent_coding import (
    EXPONENT_CODED,
    coded_starts,
    decode_outputs,
    encode_panels,
)
from loraplex_kernels.cpu.model_ops import dtype_code
from loraplex_kernels.formats.storage import WeightRange

from .base_linear import BaseLinear, part_of, stack_biases
from .native_product import NativeProduct, pad_panels

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
            self._bias = None if bias is None else pad_panels(bias.float())
            memory = memory or WeightRange(
                packed_words(self.out_features, self.in_features, self.dtype)
            )
            self._weight = self._pack(
                _Panels(weights, self._unit, memory.n_bytes // _TEMPORARY_SHARE),
                memory,
                exponent_coding=exponent_coding and self.dtype is torch.bfloat16,
            )
        self._product: NativeProduct | None = None
        if self._code is not None:
            address = self._weight.data_ptr() + (EXPONENT_CODED if self._is_coded else 0)
            shape = (self.n_out, self.in_features)
            self._product = NativeProduct(
                address, self._weight.nbytes, self._bias, shape, self.dtype
            )
            self.native = self._product.weights

    def __call__(self, x: Tensor) -> Tensor:
        if self._code is None:
            return functional.linear(x, self._weight, self._bias)
        return super().__call__(x)

    def into(self, x: Tensor, out: Tensor) -> None:
        if self._product is None:
            _multiply(x, self._weight, self._bias, out)
        else:
            self._product.into(x, out)

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        outputs = part_of(self.out_features, index)
        if self._code is None:
            bias = None if self._bias is None else self._bias[outputs]
            _multiply(x, self._weight[outputs], bias, out)
        else:
            out.copy_(self(x)[:, outputs])

    def argmax(self, x: Tensor, masks: NDArray[np.int32] | None = None) -> Tensor:
        product = self._product
        return super().argmax(x, masks) if product is None else product.argmax(x, masks)

    def embed(self, token_ids: Tensor) -> Tensor:
        if self._code is None:
            return self._weight[token_ids]
        if self._is_coded:
            return decode_outputs(self._weight, self.in_features // self._unit, token_ids)
        return self._weight[token_ids // PANEL, :, token_ids % PANEL].view(self.dtype)

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
        weight = memory.take(panels.n_panels * panels.n_words * PANEL).view(*shape, PANEL)
        first = 0
        for part in panels:
            weight[first : first + part.shape[0]] = part
            first += part.shape[0]
        return weight

    @property
    def n_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)


def packed_words(out_features: Sequence[int], in_features: int, dtype: torch.dtype) -> int:
    """Return the most 32-bit words of a ``WeightRange`` that a linear takes."""
    n_panels = -(-sum(out_features) // PANEL)
    return WeightRange.words_of(n_panels * PANEL * in_features * dtype.itemsize // 4)


class _Panels:
    """The weights cut into panels: words int32 [n, K / unit, 32]. Rows beyond n_out are zero.

    Each iteration packs again, unless there are few panels: a temporary copy of a large head would
    set the memory peak of a load.
    """

    def __init__(self, weights: Sequence[Tensor], unit: int, temporary_bytes: int) -> None:
        self._weights, self._unit = weights, unit
        n_bytes = max(_TEMPORARY_BYTES, temporary_bytes)
        self.n_words = weights[0].shape[1] // unit
        self.n_panels = -(-sum(weight.shape[0] for weight in weights) // PANEL)
        self._at_once = max(1, n_bytes // (self.n_words * PANEL * 4))
        self._all = self._pack(0) if self.n_panels <= self._at_once else None

    def __iter__(self) -> Iterator[Tensor]:
        if self._all is not None:
            yield self._all
            return
        for first in range(0, self.n_panels, self._at_once):
            yield self._pack(first)

    def _pack(self, first_panel: int) -> Tensor:
        first, end = first_panel * PANEL, (first_panel + self._at_once) * PANEL
        parts, start = [], 0
        for weight in self._weights:
            n_rows = weight.shape[0]
            part = weight.detach()[max(0, first - start) : max(0, min(n_rows, end - start))]
            parts += [part] if part.shape[0] else []
            start += n_rows
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        words = pad_panels(rows.contiguous()).view(torch.int32)
        return words.view(-1, PANEL, self.n_words).transpose(1, 2).contiguous()


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
