"""Weights in eight or four bits: codes, and scales that several inputs share.

    W[n, k] = round_dtype(code[n, k] · scale[n, k // group_size])

The product is float32, rounded once to the dtype of the model. Whatever multiplies by a quantised
weight multiplies by this W: kernels, the norms of DoRA, training, the self-check.

    int8   two's complement, -127 … 127
    fp8    e4m3 (OCP's "fn": no infinity, largest 448), one byte; NaN does not occur
    int4   code + 8 in four bits. Byte j of a group of g inputs holds input j in its low half and
           input g / 2 + j in its high half, so a tile of bytes is two tiles of neighbouring inputs.

All are symmetric: there is no zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

__all__ = ["QuantizedWeight", "WeightFormat", "code_values", "pack_int4", "quantize_weight"]

_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # that the largest weight of a group becomes
_ROWS_AT_ONCE = 4096  # outputs whose float32 copies exist at once
_GROUPS = (128, 64)  # of int4: the first that divides the inputs, else the last, cut short
_FP8 = torch.float8_e4m3fn


class WeightFormat(StrEnum):
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self is WeightFormat.INT8 else torch.uint8

    @property
    def codes_a_byte(self) -> int:
        return 2 if self is WeightFormat.INT4 else 1


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight [n_out, in_features], or several that read the same input one below the other."""

    format: WeightFormat
    codes: Tensor  # [n_out, in_features], of int4 uint8 [n_out, n_groups · group_size / 2]
    scales: Tensor  # floating point [n_out, n_groups]
    in_features: int
    group_size: int  # inputs that share a scale; in_features: each output has one
    dtype: torch.dtype  # of W

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

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """W [n_out, in_features]."""
        return self.rows(slice(None))

    def rows(self, outputs: Tensor | slice) -> Tensor:
        """Rows ``outputs`` of W (int64 [T] or a slice): [T, in_features]."""
        codes, scales = self.codes[outputs], self.scales[outputs].float()
        values = code_values(codes, self.format)
        if self.format is WeightFormat.INT4:  # [2, T, bytes]: low halves, then high halves
            grouped = values.reshape(2, codes.shape[0], -1, self.group_size // 2)
            values = grouped.permute(1, 2, 0, 3).flatten(1)[:, : self.in_features]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
        return (values * scales).to(self.dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        codes, scales = self.codes.to(device), self.scales.to(device)
        return QuantizedWeight(
            self.format, codes, scales, self.in_features, self.group_size, self.dtype
        )

    @staticmethod
    def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One below the other. Raises ValueError if they differ in more than their rows."""
        first = weights[0]
        kinds = {(w.format, w.in_features, w.group_size, w.dtype) for w in weights}
        if len(kinds) > 1:
            raise ValueError(f"weights that share an input are quantised differently: {kinds}")
        if len(weights) == 1:
            return first
        return QuantizedWeight(
            first.format,
            torch.cat([w.codes for w in weights]),
            torch.cat([w.scales for w in weights]),
            first.in_features,
            first.group_size,
            first.dtype,
        )


def quantize_weight(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """Codes and scales of ``weight`` [n_out, in_features], on its device.

    int8 and fp8 have a float32 scale for each output, int4 one of the weight's dtype for each 128
    inputs (64 where 128 does not divide them): the scale takes the largest of them to the largest
    code, and each weight becomes the nearest code. Raises ValueError for what is not finite.
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
    """Codes of int4 from ``offset`` [n_out, in_features] uint8: each code + 8."""
    missing = -offset.shape[1] % group_size
    full = torch.nn.functional.pad(offset, (0, missing), value=8)
    halves = full.view(offset.shape[0], -1, 2, group_size // 2)
    packed: Tensor = halves[:, :, 0] | halves[:, :, 1] << 4
    return packed.flatten(1)


def code_values(codes: Tensor, format: WeightFormat) -> Tensor:
    """float32 values of ``codes``; of int4 [2, *codes.shape], the low and the high halves."""
    if format is WeightFormat.INT4:
        return torch.stack([codes & 15, codes >> 4]).to(torch.float32) - 8
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
    scales = largest / _LARGEST[format]
    if format is WeightFormat.INT4:
        scales = scales.to(rows.dtype)
    # a group of zeros, or of what no scale can tell from zero, has any scale: its codes are zero
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
