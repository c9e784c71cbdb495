"""Weights in eight or four bits: codes, and scales that groups of inputs share.

    W[n, k] = round_dtype(code[n, k] · scale[n, k // group_size])

The product is float32, rounded once to the dtype of the model. Kernels, the norms of DoRA, training
and the self-check all multiply by this W.

    int8   two's complement, -127 … 127
    fp8    e4m3 (OCP "fn": no infinity, largest 448) in one byte, never NaN
    int4   code + zero in four bits. Byte j of a group of g inputs holds input j in its low half and
           input g / 2 + j in its high half, so a tile of bytes is two tiles of neighbouring inputs.

int8 and fp8 are symmetric. The zero of int4 is 8, or each scale has its own zero (AWQ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # code of a group's largest weight
_ROWS_AT_ONCE = 4096  # outputs with float32 copies at the same time
_GROUPS = (128, 64)  # int4 takes the first that divides the inputs, else the last, cut short
_SMALLER_GROUPS = (128, 64, 32)  # group sizes that a cut may leave
ZERO = 8  # of int4 without zeros
_FP8 = torch.float8_e4m3fn


class WeightFormat(StrEnum):
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self is WeightFormat.INT8 else torch.uint8


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [n_out, in_features], or several weights of one input, stacked by outputs."""

    format: WeightFormat
    codes: Tensor  # [n_out, in_features]; int4: uint8 [n_out, n_groups · group_size / 2]
    scales: Tensor  # floating point [n_out, n_groups]
    in_features: int
    group_size: int  # inputs that share a scale; in_features: each output has one
    dtype: torch.dtype  # of W
    zeros: Tensor | None = None  # int4: uint8 [n_out, n_groups], 0 … 15; None: all are 8

    def __post_init__(self) -> None:
        n_out = self.codes.shape[0]
        n_groups = -(-self.in_features // self.group_size)
        width = self.in_features
        if self.format is WeightFormat.INT4:
            width = n_groups * self.group_size // 2
        if (
            self.codes.dtype is not self.format.code_dtype
            or self.codes.shape != (n_out, width)
            or self.scales.shape != (n_out, n_groups)
            or not self.scales.dtype.is_floating_point
        ):
            raise ValueError(
                f"{self.format} codes of [{n_out}, {self.in_features}] in groups of "
                f"{self.group_size} are {self.format.code_dtype} [{n_out}, {width}] with scales "
                f"[{n_out}, {n_groups}]; got {self.codes.dtype} {tuple(self.codes.shape)} with "
                f"{self.scales.dtype} {tuple(self.scales.shape)}"
            )
        if self.zeros is not None and (
            self.format is not WeightFormat.INT4
            or self.zeros.dtype is not torch.uint8
            or self.zeros.shape != self.scales.shape
        ):
            raise ValueError(
                f"zeros are uint8 beside each scale of int4; got {self.zeros.dtype} "
                f"{tuple(self.zeros.shape)} of {self.format}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def n_bytes(self) -> int:
        """Return the bytes of codes, scales and zeros."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros

    def dequantize(self) -> Tensor:
        """Return W [n_out, in_features]."""
        return self.rows(slice(None))

    def rows(self, outputs: Tensor | slice) -> Tensor:
        """Return rows ``outputs`` of W (int64 [T] or a slice): [T, in_features]."""
        values = code_values(self._single_codes(outputs), self.format)
        if self.format is WeightFormat.INT4:
            zeros = self.zeros
            values -= ZERO if zeros is None else self._of_inputs(zeros[outputs].float())
        return (values * self._of_inputs(self.scales[outputs].float())).to(self.dtype)

    def single_codes(self) -> Tensor:
        """Return codes [n_out, in_features], one in a byte. int4 codes include their zero."""
        return self._single_codes(slice(None))

    def to(self, device: torch.device) -> QuantizedWeight:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
        )

    def cut(self, outputs: slice, inputs: slice) -> QuantizedWeight:
        """Return W[outputs, inputs] with the same bits, in separate memory.

        Groups that the cut divides become smaller groups of at least 32 inputs. Raises ValueError
        if they would be smaller.
        """
        first, end, _ = inputs.indices(self.in_features)
        codes, scales = self._single_codes(outputs)[:, first:end], self.scales[outputs]
        zeros = None if self.zeros is None else self.zeros[outputs]
        group_size = end - first  # of one group
        if self.format is WeightFormat.INT4 or scales.shape[1] > 1:
            group_size = self._group_size_within(first, end)
            groups = torch.arange(first, end, group_size, device=self.device) // self.group_size
            scales = scales[:, groups]
            zeros = None if zeros is None else zeros[:, groups]
        if self.format is WeightFormat.INT4:
            codes = pack_int4(codes, group_size)
        return QuantizedWeight(
            self.format,
            codes.clone(memory_format=torch.contiguous_format),
            scales.clone(memory_format=torch.contiguous_format),
            end - first,
            group_size,
            self.dtype,
            None if zeros is None else zeros.clone(memory_format=torch.contiguous_format),
        )

    def part(self, outputs: slice) -> QuantizedWeight:
        """Return a view of these outputs."""
        zeros = None if self.zeros is None else self.zeros[outputs]
        return replace(self, codes=self.codes[outputs], scales=self.scales[outputs], zeros=zeros)

    @staticmethod
    def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Stack weights by outputs. Raises ValueError if they differ in more than their rows."""
        first = weights[0]
        kinds = {(w.format, w.in_features, w.group_size, w.dtype) for w in weights}
        if len(kinds) > 1:
            raise ValueError(f"weights that share an input are quantised differently: {kinds}")
        if len(weights) == 1:
            return first
        has_zeros = any(w.zeros is not None for w in weights)
        return replace(
            first,
            codes=torch.cat([w.codes for w in weights]),
            scales=torch.cat([w.scales for w in weights]),
            zeros=torch.cat([w._own_zeros() for w in weights]) if has_zeros else None,
        )

    def _single_codes(self, outputs: Tensor | slice) -> Tensor:
        codes = self.codes[outputs]
        if self.format is not WeightFormat.INT4:
            return codes
        grouped = codes.view(codes.shape[0], -1, 1, self.group_size // 2)
        halves: Tensor = torch.cat([grouped & 15, grouped >> 4], dim=2)  # low, then high
        return halves.flatten(1)[:, : self.in_features]

    def _of_inputs(self, of_groups: Tensor) -> Tensor:
        """Expand [T, n_groups] to one value for each input, or [T, 1] if there is one group."""
        if of_groups.shape[1] == 1:
            return of_groups
        return of_groups.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

    def _own_zeros(self) -> Tensor:
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, ZERO, dtype=torch.uint8, device=self.device)

    def _group_size_within(self, first: int, end: int) -> int:
        """Return the largest size of groups that cross neither present groups nor the cut.

        The last group of all inputs may be cut short.
        """
        for size in (self.group_size, *_SMALLER_GROUPS):
            ends_within = end == self.in_features or (end - first) % size == 0
            if self.group_size % size == 0 and first % size == 0 and ends_within:
                return size
        raise ValueError(
            f"inputs {first} … {end} of {self.in_features} do not begin and end with groups of "
            f"{self.group_size} inputs or a part of 32, 64 or 128 of one"
        )


def quantize_weight(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Quantise ``weight`` [n_out, in_features] on its device.

    int8 has a float16 scale for each output, fp8 a float32 one. int4 has a float16 scale for each
    128 inputs (64 where 128 does not divide them). A scale maps the largest weight of its group to
    the largest code, and each weight becomes the nearest code. Raises ValueError if a weight is not
    finite, or too large for a scale.
    """
    in_features = weight.shape[1]
    group_size = in_features
    if format is WeightFormat.INT4:
        group_size = next((g for g in _GROUPS if in_features % g == 0), _GROUPS[-1])
    parts = [
        _quantize_rows(rows, format, group_size)
        for rows in torch.split(weight.detach(), _ROWS_AT_ONCE)
    ]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(format, codes, scales, in_features, group_size, weight.dtype)


def pack_int4(offset: Tensor, group_size: int) -> Tensor:
    """Pack ``offset`` [n_out, in_features] uint8, each an int4 code plus its zero."""
    missing = -offset.shape[1] % group_size
    full = torch.nn.functional.pad(offset, (0, missing), value=ZERO)
    halves = full.view(offset.shape[0], -1, 2, group_size // 2)
    packed: Tensor = halves[:, :, 0] | halves[:, :, 1] << 4
    return packed.flatten(1)


def code_values(codes: Tensor, format: WeightFormat) -> Tensor:
    """Return the float32 values of ``codes``, one a byte. int4 values still include the zero."""
    if format is WeightFormat.FP8 and codes.is_cpu:  # torch's cast takes three times as long
        table = torch.arange(256, dtype=torch.uint8).view(_FP8).to(torch.float32)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    if format is WeightFormat.FP8:
        return codes.view(_FP8).to(torch.float32)
    return codes.to(torch.float32)


def _quantize_rows(rows: Tensor, format: WeightFormat, group_size: int) -> tuple[Tensor, Tensor]:
    n_out, in_features = rows.shape
    missing = -in_features % group_size
    values = torch.nn.functional.pad(rows.float(), (0, missing))
    grouped = values.view(n_out, -1, group_size)
    largest = grouped.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise ValueError("a weight that is not finite cannot be quantised")
    # The divisor is a tensor: CUDA multiplies by the reciprocal of a number, and scales would
    # differ from those of the CPU, which computes the weights for adapters of sharded bases.
    scales = largest / largest.new_full((1,), _LARGEST[format])
    if format is not WeightFormat.FP8:
        scales = scales.half()
        if bool(scales.isinf().any()):
            raise ValueError(f"a weight of {float(largest.max()):g} is too large to be quantised")
    # A group of zeros, or of values that underflow, may have any scale: its codes are zero.
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = grouped / scales.float().unsqueeze(-1)
    if format is WeightFormat.FP8:
        codes = steps.clamp(-448, 448).to(_FP8).view(torch.uint8)
        return codes.view(n_out, -1)[:, :in_features].contiguous(), scales
    if format is WeightFormat.INT8:
        codes = steps.round().clamp(-127, 127).to(torch.int8)
        return codes.view(n_out, -1)[:, :in_features].contiguous(), scales
    return pack_int4(
        (steps.round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1), group_size
    ), scales
