"""Quantised weights in the order of native code's panels, made plain a few panels at a time.

``csrc/linear.inc`` multiplies by panels of 32 outputs: word (k, n) holds w[n, k] or a pair of k.
The codes lie in that order too, so that making some panels plain is one product by the scales. They
are multiplied before the next ones are made: memory holds codes, and a few megabytes of plain
words. A product has the bits that the dequantised weight would give, packed whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_kernels.cpu.model_ops import dtype_code, native_ops

from .quantized_weight import QuantizedWeight, WeightFormat, code_values

__all__ = ["PANEL", "QuantizedPanels"]

PANEL = 32  # outputs side by side, as csrc/linear.inc has it
_SCRATCH_BYTES = 4 << 20  # of plain words


class QuantizedPanels:
    """A weight [n_out, in_features] for native code. float32 and bfloat16, inputs even in number.

    Reentrant. Copies what it is given.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self._format, self._dtype = weight.format, weight.dtype
        self._n_out, self._in_features = weight.shape
        self._group_size = weight.group_size
        self._unit = 2 if self._dtype.itemsize == 2 else 1  # elements of a 32-bit word
        n_panels = -(-self._n_out // PANEL)
        codes, scales = _in_order(weight), weight.scales
        missing = n_panels * PANEL - self._n_out
        if missing:
            codes = torch.cat([codes, codes.new_zeros(missing, codes.shape[1])])
            scales = torch.cat([scales, scales.new_zeros(missing, scales.shape[1])])
        step = 1 if self._format is WeightFormat.INT4 else self._unit  # codes of an output, by word
        # [n_panels, words, 32, step]
        self._codes = codes.view(n_panels, PANEL, -1, step).transpose(1, 2).contiguous()
        self._scales = scales.view(n_panels, PANEL, -1).transpose(1, 2).contiguous()
        self._at_once = max(
            1, _SCRATCH_BYTES // (self._in_features * PANEL * weight.dtype.itemsize)
        )

    @staticmethod
    def takes(weight: QuantizedWeight) -> bool:
        """Whether native code can multiply by it here."""
        on_cpu = weight.device.type == "cpu" and dtype_code(weight.dtype) is not None
        return on_cpu and weight.in_features % 2 == 0

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
        codes = self._codes[panels, :, lanes]  # [T, words, step]
        scales = self._scales[panels, :, lanes].float()
        values = code_values(codes, self._format)
        if self._format is WeightFormat.INT4:
            values = values.permute(1, 2, 3, 0)  # [T, pairs, 1, even and odd]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self._group_size, dim=1)[:, : self._in_features]
        return (values.flatten(1) * scales).to(self._dtype)

    @property
    def device(self) -> torch.device:
        return self._codes.device

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return self._codes.nbytes + self._scales.nbytes

    def _plain(self, panels: slice) -> Tensor:
        """Words of some panels, [n, in_features / unit, 32, unit] of the dtype, contiguous."""
        values = code_values(self._codes[panels], self._format)
        if self._format is WeightFormat.INT4:  # [2, n, pairs, 32, 1]
            if self._unit == 2:
                values = values.squeeze(-1).permute(1, 2, 3, 0)
            else:
                values = values.permute(1, 2, 0, 3, 4).flatten(1, 2)
        scales = self._scales[panels].float()
        if scales.shape[1] > 1:
            n_words = values.shape[1]
            scales = scales.repeat_interleave(self._group_size // self._unit, dim=1)[:, :n_words]
        # written in the order of memory, whatever order the values come in
        words = torch.empty(values.shape, dtype=self._dtype)
        return torch.mul(values, scales.unsqueeze(-1), out=words)


def _in_order(weight: QuantizedWeight) -> Tensor:
    """Codes [n_out, in_features]; of int4 [n_out, in_features / 2], each byte an even input in its
    low half and the next one in its high half.
    """
    if weight.format is not WeightFormat.INT4:
        return weight.codes
    halves = torch.stack([weight.codes & 15, weight.codes >> 4])
    grouped = halves.view(
        2, weight.shape[0], -1, weight.group_size // 2
    )  # [2, n_out, n_groups, g / 2]
    single = grouped.permute(1, 2, 0, 3).flatten(1)[:, : weight.in_features]
    pairs: Tensor = single[:, ::2] | single[:, 1::2] << 4
    return pairs
