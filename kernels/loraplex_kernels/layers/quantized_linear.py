"""Frozen linears of the base with quantised weights, the counterpart of ``PackedLinear``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.cpu.model_ops import dtype_code, native_ops
from loraplex_kernels.formats.quantized_weight import (
    ZERO,
    QuantizedWeight,
    WeightFormat,
    code_values,
)

from .base_linear import BaseLinear, part_of, stack_biases
from .native_product import PANEL, pad_panels

_REFERENCE_BYTES = 4 << 20  # dequantised rows that exist at the same time
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SCRATCH_BYTES = 4 << 20  # plain words


class QuantizedLinear(BaseLinear):
    """Linears with quantised weights. The weights it returns are dequantised.

    Only codes and scales are stored. On a CPU native code multiplies in float32 and bfloat16. A row
    has the bits that ``PackedLinear`` of the dequantised weights gives it, in every batch. On a GPU
    a Triton kernel runs, elsewhere the reference. Nothing is recorded for autograd.
    """

    def __init__(self, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> None:
        """Raises ValueError if the weights differ in format, group size or dtype."""
        stacked = QuantizedWeight.stack(weights)
        out_features = [weight.shape[0] for weight in weights]
        super().__init__(out_features, stacked.in_features, stacked.dtype)
        self.format = stacked.format
        bias = stack_biases(self.out_features, biases)
        self._bias = None if bias is None else bias.to(stacked.device)
        self._weight: QuantizedWeight | QuantizedPanels = stacked
        if QuantizedPanels.takes(stacked):
            self._weight = QuantizedPanels(stacked)
            self._bias = None if bias is None else pad_panels(bias.float())

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
        if isinstance(self._weight, QuantizedPanels):
            self._weight.into(x, self._bias, out)
        else:
            quantized_linear(x, self._weight, self._bias, out=out)

    def into_part(self, index: int, x: Tensor, out: Tensor) -> None:
        outputs = part_of(self.out_features, index)
        if isinstance(self._weight, QuantizedPanels):
            out.copy_(self(x)[:, outputs])
        else:
            bias = None if self._bias is None else self._bias[outputs]
            quantized_linear(x, self._weight.part(outputs), bias, out=out)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._weight.rows(token_ids.to(self._weight.device))

    @property
    def n_bytes(self) -> int:
        return self._weight.n_bytes + (0 if self._bias is None else self._bias.nbytes)


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


class QuantizedPanels:
    """A weight [n_out, in_features] of float32 or bfloat16, in the order of native code's panels.

    ``csrc/layers/linear.inc`` multiplies by panels of 32 outputs: word (k, n) holds w[n, k] or a
    pair of k. Codes are stored in that order, so dequantising panels is one product by the scales.
    Panels are multiplied before the next panels are dequantised: memory holds the codes and a few
    megabytes of plain words. A product has the bits of the dequantised weight, packed whole.

    A word of k has 32 · unit elements: one (float32) or a pair (bfloat16) for each of 32 outputs. A
    byte of int4 has two elements: one of word i in its low half, one of word i + n_words / 2 in its
    high half. Reentrant. Copies the weight.
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
        """Return True if native code can multiply by the weight here."""
        on_cpu = weight.device.type == "cpu" and dtype_code(weight.dtype) is not None
        words_even = 4 if weight.format is WeightFormat.INT4 else 2
        return on_cpu and weight.in_features % words_even == 0

    def into(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write x Wᵀ + bias to ``out`` [T, n_out].

        ``x`` [T, in_features] and ``out`` have unit column strides. ``bias`` is float32, padded to
        full panels.
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
        """Return rows ``outputs`` int64 [T] of W: [T, in_features]."""
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
        """Return the bytes of codes, scales and zeros."""
        zeros = 0 if self._zeros is None else self._zeros.nbytes
        return self._codes.nbytes + self._scales.nbytes + zeros

    def _of_inputs(self, of_groups: Tensor) -> Tensor:
        """Expand [T, n_groups] to float32 for each input, or [T, 1] if there is one group."""
        of_groups = of_groups.float()
        if of_groups.shape[1] == 1:
            return of_groups
        return of_groups.repeat_interleave(self._group_size, dim=1)[:, : self._in_features]

    def _plain(self, panels: slice) -> Tensor:
        """Dequantise panels: [n, words, 32 · unit] of the dtype, contiguous."""
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
        """Apply ``change`` to ``values`` [n, words, 32 · unit] in place, group by group."""
        of_groups = of_groups.float()
        if self._unit > 1:
            of_groups = of_groups.repeat_interleave(self._unit, dim=2)
        size = self._group_size // self._unit  # words of a group; the last group may be shorter
        n_full = values.shape[1] // size
        grouped = values[:, : n_full * size].view(values.shape[0], n_full, size, values.shape[2])
        change(grouped, of_groups[:, :n_full, None])
        change(values[:, n_full * size :], of_groups[:, n_full:])


def _of_panels(of_outputs: Tensor) -> Tensor:
    """Arrange [n_out, n_groups] by panels: [n_panels, n_groups, 32]."""
    missing = -of_outputs.shape[0] % PANEL
    padded = functional.pad(of_outputs, (0, 0, 0, missing))
    return padded.view(-1, PANEL, of_outputs.shape[1]).transpose(1, 2).contiguous()
