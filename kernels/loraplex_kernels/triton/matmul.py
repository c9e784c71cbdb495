"""A matrix product whose rows have the same bits in every batch.

    out[z, m, n] = Σ_k a[z, m, k] · b[z, k, n] + bias[n]       k ascending, one float32 accumulator

Shapes: a [Z, M, K], b [Z, K, N] with any strides; bias [N] or none. All shapes use one tile and so
one matrix instruction, and K is never split over programs. cuBLAS chooses tile, instruction and
split by M, so a row has other bits among 64 rows than alone. Programs of one block of outputs and
different rows run at the same time, so a weight is read from memory once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # rows, and outputs, of a program
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["n_rows", "stride_az", "stride_am", "stride_oz", "stride_om"])
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, n_rows, n_out,
    stride_az, stride_am, stride_ak, stride_bz, stride_bk, stride_bn, stride_oz, stride_om,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    outputs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    batch = tl.program_id(2).to(tl.int64)
    in_rows, in_out = rows < n_rows, outputs < n_out
    lanes = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + batch * stride_az + rows.to(tl.int64)[:, None] * stride_am
    a_ptrs += lanes[None, :] * stride_ak
    b_ptrs = b_ptr + batch * stride_bz + outputs.to(tl.int64)[None, :] * stride_bn
    b_ptrs += lanes.to(tl.int64)[:, None] * stride_bk
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs, mask=in_rows[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=in_out[None, :], other=0.0)
        else:
            inside = lanes + first < K
            a = tl.load(a_ptrs, mask=in_rows[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=in_out[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=in_out, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + batch * stride_oz + rows.to(tl.int64)[:, None] * stride_om
    out_ptrs += outputs[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_out[None, :])


def matmul_triton(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """``out`` [Z, M, N] ← ``a`` [Z, M, K] @ ``b`` [Z, K, N] + ``bias`` [N]. Allocates nothing.

    Raises ValueError before the launch when a shape, stride, dtype or device does not fit.
    """
    _check(a, b, bias, out)
    n_batches, n_rows, in_features = a.shape
    n_out = b.shape[2]
    if out.numel() == 0:
        return
    if in_features == 0:
        out.copy_(torch.zeros_like(out) if bias is None else bias.expand_as(out))
        return
    grid = (triton.cdiv(n_rows, TILE), triton.cdiv(n_out, TILE), n_batches)
    matmul_kernel[grid](
        a, b, b if bias is None else bias, out, n_rows, n_out,
        *a.stride(), *b.stride(), out.stride(0), out.stride(1),
        K=in_features, HAS_BIAS=bias is not None, TILE=TILE,
        BLOCK_K=64 if a.element_size() == 2 else 16,
        num_warps=4, num_stages=4, enable_fp_fusion=False,
    )  # fmt: skip


def _check(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"a is {tuple(a.shape)}, b {tuple(b.shape)}; [Z, M, K] and [Z, K, N]")
    if out.shape != (a.shape[0], a.shape[1], b.shape[2]):
        raise ValueError(f"out is {tuple(out.shape)} for {tuple(a.shape)} @ {tuple(b.shape)}")
    if a.dtype not in _DTYPES or not a.dtype == b.dtype == out.dtype:
        raise ValueError(f"a is {a.dtype}, b {b.dtype}, out {out.dtype}; all must be one of floats")
    if out.numel() and out.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError("out must be contiguous along its columns")
    if bias is not None and (bias.shape != (b.shape[2],) or not bias.is_contiguous()):
        raise ValueError(f"bias is {tuple(bias.shape)}, out has {b.shape[2]} columns")
    tensors = (b, out) if bias is None else (b, out, bias)
    if any(tensor.device != a.device for tensor in tensors):
        raise ValueError(f"a is on {a.device}; b, bias and out must be there too")
    if a.shape[1] > 65535 * TILE or b.shape[2] > 65535 * TILE:
        raise ValueError("the product has too many rows or columns for the grid")
