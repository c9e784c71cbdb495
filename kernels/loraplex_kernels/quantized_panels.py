"""Quantised weights in the order of native code's panels, made plain a few panels at a time.

``csrc/linear.inc`` multiplies by panels of 32 outputs: word (k, n) holds w[n, k] or a pair of k.
The codes lie in that order too, so that making some panels plain is one product by the scales. They
are multiplied before the next ones are made: memory holds codes, and a few megabytes of plain
words. A product has the bits that the dequantised weight would give, packed whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.cpu.model_ops import dtype_code, native_ops

from .quantized_weight import ZERO, QuantizedWeight, WeightFormat, code_values

__all__ = ["PANEL", "QuantizedPanels"]

PANEL = 32  # outputs side by side, as csrc/linear.inc has it
_SCRATCH_BYTES = 4 << 20  # of plain words


class QuantizedPanels:
    """A weight [n_out, in_features] for native code, of float32 or bfloat16.

    A word of k has 32 · unit elements: of each of 32 outputs one (float32) or a pair (bfloat16). A
    byte of int4 holds an element of a word of the first half of k in its low half, and one of the
    word as far into the second half in its high half. Reentrant. Copies what it is given.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self._format, self._dtype = weight.format, weight.dtype
        self._n_out, self._in_features = weight.shape
        self._unit = 2 if self._dtype.itemsize == 2 else 1  # elements of a 32-bit word
        self._group_size = weight.group_size
        n_panels = -(-self._n_out // PANEL)
        missing = n_panels * PANEL - self._n_out
        codes = functional.pad(weight.single_codes(), (0, 0, 0, missing))
        words = codes.view(n_panels, PANEL, -1, self._unit).transpose(1, 2).flatten(2)
        if self._format is WeightFormat.INT4:
            low, high = words.chunk(2, dim=1)
            words = low | high << 4
        self._codes = words.contiguous()  # [n_panels, words or half of them, 32 · unit]
        self._scales = _of_panels(weight.scales)  # [n_panels, n_groups, 32]
        self._zeros = None if weight.zeros is None else _of_panels(weight.zeros)
        self._at_once = max(1, _SCRATCH_BYTES // (self._in_features * PANEL * 4))

    @staticmethod
    def takes(weight: QuantizedWeight) -> bool:
        """Whether native code can multiply by it here."""
        on_cpu = weight.device.type == "cpu" and dtype_code(weight.dtype) is not None
        words_even = 4 if weight.format is WeightFormat.INT4 else 2
        return on_cpu and weight.in_features % words_even == 0

    def into(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes x Wᵀ + bias to ``out``; ``x`` [T, in_features], ``out`` [T, n_out] have unit
        column strides, ``bias`` is float32 [n_out in full panels].
        """
        linear = native_ops(keep_gil=False).linear
        code = dtype_code(self._dtype)
        for first in range(0, self._codes.shape[0], self._at_once):
            words = self._plain(slice(first, first + self._at_once))
            start = first * PANEL
            n_out = min(words.shape[0] * PANEL, self._n_out - start)
            linear(
                code,
                x.data_ptr(),
                x.stride(0),
                words.data_ptr(),
                0 if bias is None else bias.data_ptr() + start * bias.element_size(),
                out.data_ptr() + start * out.element_size(),
                out.stride(0),
                x.shape[0],
                n_out,
                self._in_features,
            )

    def rows(self, outputs: Tensor) -> Tensor:
        """Rows ``outputs`` int64 [T] of W: [T, in_features]."""
        panels, lanes = outputs // PANEL, outputs % PANEL
        elements = lanes[:, None] * self._unit + torch.arange(self._unit)  # of a word
        codes = self._codes[panels[:, None], :, elements]  # [T, unit, words]
        if self._format is WeightFormat.INT4:
            codes = torch.cat([codes & 15, codes >> 4], dim=2)
        values = code_values(codes, self._format).transpose(1, 2).flatten(1)
        if self._format is WeightFormat.INT4:
            zeros = self._zeros
            values -= ZERO if zeros is None else self._of_inputs(zeros[panels, :, lanes])
        return (values * self._of_inputs(self._scales[panels, :, lanes])).to(self._dtype)

    @property
    def device(self) -> torch.device:
        return self._codes.device

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        zeros = 0 if self._zeros is None else self._zeros.nbytes
        return self._codes.nbytes + self._scales.nbytes + zeros

    def _of_inputs(self, of_groups: Tensor) -> Tensor:
        """[T, n_groups] as float32 for each input, or [T, 1] if there is one group."""
        of_groups = of_groups.float()
        if of_groups.shape[1] == 1:
            return of_groups
        return of_groups.repeat_interleave(self._group_size, dim=1)[:, : self._in_features]

    def _plain(self, panels: slice) -> Tensor:
        """Words of some panels, [n, words, 32 · unit] of the dtype, contiguous."""
        codes = self._codes[panels]
        if self._format is WeightFormat.INT4:
            codes = torch.cat([codes & 15, codes >> 4], dim=1)
        values = code_values(codes, self._format)
        if self._zeros is not None:
            self._by_groups(values, self._zeros[panels], torch.Tensor.sub_)
        elif self._format is WeightFormat.INT4:
            values.sub_(ZERO)
        self._by_groups(values, self._scales[panels], torch.Tensor.mul_)
        return values.to(self._dtype)

    def _by_groups(
        self, values: Tensor, of_groups: Tensor, change: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """``change`` of ``values`` [n, words, 32 · unit], in place, by what each group has."""
        of_groups = of_groups.float()
        if self._unit > 1:
            of_groups = of_groups.repeat_interleave(self._unit, dim=2)
        size = self._group_size // self._unit  # words of a group; the last group may have fewer
        n_full = values.shape[1] // size
        grouped = values[:, : n_full * size].view(values.shape[0], n_full, size, values.shape[2])
        change(grouped, of_groups[:, :n_full, None])
        change(values[:, n_full * size :], of_groups[:, n_full:])


def _of_panels(of_outputs: Tensor) -> Tensor:
    """[n_out, n_groups] → [n_panels, n_groups, 32]."""
    missing = -of_outputs.shape[0] % PANEL
    padded = functional.pad(of_outputs, (0, 0, 0, missing))
    return padded.view(-1, PANEL, of_outputs.shape[1]).transpose(1, 2).contiguous()
