"""Quantised weights as the blocks of GGUF that native code multiplies by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.formats.quantized_weight import QuantizedWeight, WeightFormat

from .blocks import BLOCK
from .gguf_weight import BLOCK_TYPES, GgufWeight

_Q4_0, _Q4_1, _Q8_0 = 2, 3, 8  # numbers of types


def as_blocks(weight: QuantizedWeight) -> GgufWeight | None:
    """Return an int8 or int4 weight in blocks, which hold scales in float16; None if it has none.

    int8 becomes Q8_0, int4 becomes Q4_0, and int4 with zeros Q4_1. In bfloat16 and float16, whose
    weights are rounded anyway, a scale may be rounded by 2⁻¹¹ of it, in float32 not at all.
    """
    groups_fit = weight.scales.shape[1] == 1 or weight.group_size % BLOCK == 0
    if weight.format is WeightFormat.FP8 or weight.in_features % BLOCK or not groups_fit:
        return None
    scales = _of_blocks(weight, weight.scales.float())
    halves = [scales.half()]
    limit = scales * (0.0 if weight.dtype is torch.float32 else 2**-11)
    is_near = (halves[0] - scales).abs() <= limit
    if weight.zeros is not None:
        offset = -scales * _of_blocks(weight, weight.zeros.float())
        halves.append(offset.half())
        is_near &= (halves[1] - offset).abs() <= 15 * limit  # an offset is up to 15 scales
    if not bool(is_near.all()):
        return None
    codes = weight.single_codes().view(torch.uint8).view(*scales.shape, BLOCK)
    if weight.format is WeightFormat.INT8:
        return _blocks(_Q8_0, [*halves, codes], weight.dtype)
    low, high = codes.chunk(2, dim=2)
    number = _Q4_0 if weight.zeros is None else _Q4_1
    return _blocks(number, [*halves, low | high << 4], weight.dtype)


def _of_blocks(weight: QuantizedWeight, of_groups: Tensor) -> Tensor:
    """Expand [n_out, n_groups] to each block: [n_out, n_blocks]."""
    n_blocks = weight.in_features // BLOCK
    return of_groups[:, torch.arange(n_blocks) * BLOCK // weight.group_size]


def _blocks(number: int, parts: Sequence[Tensor], dtype: torch.dtype) -> GgufWeight:
    """Return the weight whose blocks hold ``parts`` [n_out, n_blocks, ...], one after the other."""
    as_bytes = [part.contiguous().view(torch.uint8).view(*part.shape[:2], -1) for part in parts]
    return GgufWeight(BLOCK_TYPES[number], torch.cat(as_bytes, dim=2).flatten(1), dtype)
