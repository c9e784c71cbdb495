"""RMSNorm of rows, with the addition of a residual, in one launch.

    x ← residual + x, written to residual        if there is a residual; rounded to the rows' dtype
    out = x / √(mean(x²) + eps) · (offset + weight)

Shapes: x, residual, out [T, width]; weight [width]. Rounds where ``rms_norm_reference`` does. One
program computes one row, and its shape depends on the width alone, so a row has the same bits in
every batch.
"""

import triton
import triton.language as tl
from torch import Tensor

MAX_NORM_WIDTH = 32768  # a row must fit the registers of one program


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, stride_xt, stride_rt, stride_ot, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < WIDTH
    x = tl.load(x_ptr + row * stride_xt + dims, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        pointers = residual_ptr + row * stride_rt + dims
        before = tl.load(pointers, mask=inside, other=0.0)
        x = (before.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(pointers, x, mask=inside)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / WIDTH + eps)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    if not HAS_OFFSET:
        normed = normed.to(x.dtype).to(tl.float32)
    out = normed * (offset + weight)
    tl.store(out_ptr + row * stride_ot + dims, out.to(x.dtype), mask=inside)


@triton.jit
def norm_heads_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, stride_t, eps, N_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    inside = dims < WIDTH
    pointers = qkv_ptr + row * stride_t + head * WIDTH + dims
    x = tl.load(pointers, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / WIDTH + eps)
    if head < N_HEADS:
        weight = tl.load(q_weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    else:
        weight = tl.load(k_weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, (normed.to(x.dtype).to(tl.float32) * weight).to(x.dtype), mask=inside)


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> None:
    """``rms_norm_reference``, or ``add_rms_norm_reference`` with a residual. Rows may be strided.

    Allocates nothing. Raises ValueError before the launch when a shape, stride or dtype does not
    fit.
    """
    _check(x, weight, out, residual)
    n_rows, width = x.shape
    if n_rows == 0:
        return
    block = triton.next_power_of_2(width)
    before = x if residual is None else residual
    rms_norm_kernel[(n_rows,)](
        x, before, weight, out, x.stride(0), before.stride(0), out.stride(0), eps, offset,
        WIDTH=width, BLOCK=block, HAS_RESIDUAL=residual is not None, HAS_OFFSET=offset != 0.0,
        num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip


def norm_heads_triton(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *, n_heads: int, n_kv_heads: int
) -> None:
    """Apply ``rms_norm_triton`` to each head of q and of k, in place, in one launch.

    ``qkv`` [T, (n_heads + 2 n_kv_heads) · D], the weights [D]. Raises ValueError before the launch.
    """
    width = q_weight.shape[0]
    if qkv.dim() != 2 or qkv.shape[1] != (n_heads + 2 * n_kv_heads) * width or qkv.stride(1) != 1:
        raise ValueError(f"qkv is {tuple(qkv.shape)}, for heads of {width} elements")
    if k_weight.shape != (width,) or not (q_weight.is_contiguous() and k_weight.is_contiguous()):
        raise ValueError("the weights of q and k must be contiguous and of one width")
    if qkv.shape[0] == 0:
        return
    norm_heads_kernel[(qkv.shape[0], n_heads + n_kv_heads)](
        qkv, q_weight, k_weight, qkv.stride(0), eps,
        N_HEADS=n_heads, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor, out: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 2 or weight.shape != (x.shape[1],) or x.shape[1] > MAX_NORM_WIDTH:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be [T, width] and "
            f"[width], width up to {MAX_NORM_WIDTH}"
        )
    for rows in (out,) if residual is None else (out, residual):
        if rows.shape != x.shape or rows.dtype != x.dtype:
            raise ValueError(f"{tuple(rows.shape)} {rows.dtype} beside {tuple(x.shape)} {x.dtype}")
    for tensor in (x, weight, out, *(() if residual is None else (residual,))):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError("rows must be contiguous along the width")
