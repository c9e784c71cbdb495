"""A linear on quantised weights: codes become weights in the tile, for tensor cores.

    out[t, n] = Σ_k x[t, k] · W[n, k] + bias[n]        W[n, k] = round(code[n, k] · scale[n, group])

``formats.quantized_weight`` defines the codes. A program owns a tile of outputs and a tile of rows
and walks all inputs in ascending order with one accumulator. The bits of a row depend on neither
tile, so they are the same alone and in every batch, in decode and in prefill. The weights are the
left operand, as pages are in ``arithmetic.partial_page``, so every tile has one instruction.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.quantized_weight import ZERO, QuantizedWeight, WeightFormat

from .e4m3 import e4m3_values

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FORMATS = {WeightFormat.INT8: 0, WeightFormat.INT4: 1, WeightFormat.FP8: 2}
_ZERO = tl.constexpr(float(ZERO))
_INT4, _FP8 = tl.constexpr(1), tl.constexpr(2)
_BLOCK_K = 128  # inputs of one load of whole bytes; int4 loads a group
_NARROW = 8192  # up to this many outputs small tiles are needed to fill a GPU


class _Tile(NamedTuple):
    block_m: int  # rows
    block_n: int  # outputs
    num_warps: int
    num_stages: int


@triton.jit
def _code_values(codes, FORMAT: tl.constexpr):
    """Return the float32 values of int8 and e4m3 codes."""
    if FORMAT == _FP8:
        return e4m3_values(codes)
    return codes.to(tl.float32)


@triton.jit
def _multiply(values, scale, x_ptrs, rows_in, columns, total, K: tl.constexpr, EVEN: tl.constexpr):
    """Return ``total`` + W x for some inputs: values [N, C] float32, scale [N, 1], total [N, M]."""
    mask = rows_in[None, :]
    if not EVEN:
        mask = mask & (columns[:, None] < K)
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    w = (values * scale).to(x.dtype)
    return tl.dot(w, x, total, input_precision="ieee")


@triton.jit(do_not_specialize=["n_rows"])
def quantized_linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    stride_xm,
    stride_om,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    out_in, rows_in = outputs < N, rows < n_rows
    x_rows = x_ptr + rows[None, :].to(tl.int64) * stride_xm
    scale_row = scales_ptr + outputs * N_GROUPS
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if FORMAT == _INT4:
        HALF: tl.constexpr = GROUP // 2
        lanes = tl.arange(0, HALF)
        code_ptrs = codes_ptr + outputs[:, None].to(tl.int64) * (N_GROUPS * HALF) + lanes[None, :]
        for group in range(N_GROUPS):
            codes = tl.load(code_ptrs + group * HALF, mask=out_in[:, None], other=0)
            scale = tl.load(scale_row + group, mask=out_in, other=0.0).to(tl.float32)[:, None]
            if HAS_ZEROS:
                zero = tl.load(zeros_ptr + outputs * N_GROUPS + group, mask=out_in, other=0)
                zero = zero.to(tl.float32)[:, None]
            else:
                zero = _ZERO
            low = (codes & 15).to(tl.float32) - zero
            high = (codes >> 4).to(tl.float32) - zero
            columns = group * GROUP + lanes
            total = _multiply(
                low, scale, x_rows + columns[:, None], rows_in, columns, total, K, K % GROUP == 0
            )
            columns += HALF
            total = _multiply(
                high, scale, x_rows + columns[:, None], rows_in, columns, total, K, K % GROUP == 0
            )
    else:
        lanes = tl.arange(0, BLOCK_K)
        code_ptrs = codes_ptr + outputs[:, None].to(tl.int64) * K + lanes[None, :]
        scale = tl.load(scale_row, mask=out_in, other=0.0).to(tl.float32)[:, None]
        for first in range(0, K, BLOCK_K):
            columns = first + lanes
            mask = out_in[:, None]
            if K % BLOCK_K != 0:
                mask = mask & (columns[None, :] < K)
            codes = tl.load(code_ptrs + first, mask=mask, other=0)
            if N_GROUPS > 1:
                scale = tl.load(scale_row + first // GROUP, mask=out_in, other=0.0)
                scale = scale.to(tl.float32)[:, None]
            total = _multiply(
                _code_values(codes, FORMAT), scale, x_rows + columns[:, None],
                rows_in, columns, total, K, K % BLOCK_K == 0,
            )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=out_in, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows[None, :].to(tl.int64) * stride_om + outputs[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=out_in[:, None] & rows_in[None, :])


def quantized_linear_triton(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, out: Tensor
) -> None:
    """``quantized_linear_reference``. Rows may be strided. Allocates nothing.

    Groups of int8 and fp8 hold a multiple of 32 inputs, those of int4 are 32, 64 or 128. Raises
    ValueError before the launch when that, a shape, a stride, a dtype or a device does not fit.
    """
    _check(x, weight, bias, out)
    n_rows, n_out = out.shape
    zeros = weight.zeros
    if out.numel() == 0:
        return
    tile = _tile_of(n_rows, n_out, x.element_size(), weight.format)
    grid = (triton.cdiv(n_out, tile.block_n), triton.cdiv(n_rows, tile.block_m))
    quantized_linear_kernel[grid](
        x, weight.codes, weight.scales, weight.scales if zeros is None else zeros,
        weight.scales if bias is None else bias, out,
        n_rows, x.stride(0), out.stride(0),
        K=weight.in_features, N=n_out, GROUP=weight.group_size, N_GROUPS=weight.scales.shape[1],
        FORMAT=_FORMATS[weight.format], HAS_ZEROS=zeros is not None, HAS_BIAS=bias is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=_block_k(weight, x.element_size()),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def _tile_of(n_rows: int, n_out: int, element_size: int, format: WeightFormat) -> _Tile:
    """Choose a tile, which changes no result.

    x is read once for each tile of outputs, so tiles are as tall as still fills a GPU. Four warps
    over 64 outputs would compile to wgmma on Hopper, which sums in another order.
    """
    if element_size == 4:
        return _Tile(16, 16, 4, 2)
    if n_rows <= 16:
        if n_out <= _NARROW:
            return _Tile(16, 16, 4, 4)
        # decoding e4m3 takes more registers
        return _Tile(16, 32, 2, 4) if format is WeightFormat.FP8 else _Tile(16, 64, 2, 3)
    if n_rows <= 32:
        return _Tile(32, 32, 2, 3) if n_out <= _NARROW else _Tile(32, 64, 2, 3)
    return _Tile(64, 32, 4, 3)


def _block_k(weight: QuantizedWeight, element_size: int) -> int:
    """Return the inputs of a product of whole bytes: one group at most, the same in all batches."""
    most = _BLOCK_K if element_size == 2 else 32
    grouped = weight.scales.shape[1] > 1
    return next(k for k in (128, 64, 32) if k <= most and not (grouped and weight.group_size % k))


def _check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor) -> None:
    n_out, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features or out.shape != (x.shape[0], n_out):
        raise ValueError(
            f"x is {tuple(x.shape)}, the weight {weight.shape}, out {tuple(out.shape)}"
        )
    if x.dtype not in _DTYPES or not x.dtype == out.dtype == weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}, out {out.dtype}")
    if x.numel() and (x.stride(1) != 1 or out.stride(1) != 1):
        raise ValueError("rows must be contiguous along their features")
    if bias is not None and (bias.shape != (n_out,) or not bias.is_contiguous()):
        raise ValueError(f"bias is {tuple(bias.shape)}, the weight {weight.shape}")
    parts = [weight.codes, weight.scales, *([] if weight.zeros is None else [weight.zeros])]
    tensors = [*parts, out] + ([] if bias is None else [bias])
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"x is on {x.device}; weight, bias and out must be there too")
    if not all(part.is_contiguous() for part in parts):
        raise ValueError("codes, scales and zeros must be contiguous")
    if weight.format is WeightFormat.INT4 and weight.group_size not in (32, 64, 128):
        raise ValueError(f"int4 groups hold 32, 64 or 128 inputs, not {weight.group_size}")
    if weight.scales.shape[1] > 1 and weight.group_size % 32:
        raise ValueError(f"groups hold a multiple of 32 inputs, not {weight.group_size}")
