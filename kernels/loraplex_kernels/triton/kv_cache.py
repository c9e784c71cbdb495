"""Rotary embedding and the write of keys and values into the paged cache, in one launch.

    q, k ← x · cos + rotate_half(x) · sin        float32, one rounding; in place in q_k_v
    cache[slot] ← k, v                           negative slots are skipped

Shapes: q_k_v [T, (n_heads + 2 n_kv_heads) D]; cos, sin [n_positions, R ≤ D] turn the first R
elements of a head. On a GPU both caches are [n_pages, n_kv_heads, page_size, D] (FlashInfer's HND),
in the dtype of q_k_v or in float8_e4m3fn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import e4m3_codes


@triton.jit
def store_row(cache_ptr, slot, head, x, dims, N_KV, PAGE_SIZE, D: tl.constexpr):
    at = (slot // PAGE_SIZE * N_KV + head) * (PAGE_SIZE * D) + slot % PAGE_SIZE * D
    if cache_ptr.dtype.element_ty == tl.uint8:
        tl.store(cache_ptr + at + dims, e4m3_codes(x), mask=dims < D)
    else:
        tl.store(cache_ptr + at + dims, x, mask=dims < D)


@triton.jit
def rope_and_cache_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    stride_xt,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    head_ptr = x_ptr + row * stride_xt + head * D
    x = tl.load(head_ptr + dims, mask=inside, other=0.0)
    if ROTARY > 0 and head < N_HEADS + N_KV:
        position = tl.load(positions_ptr + row).to(tl.int64)
        turns = dims < ROTARY
        is_first = dims < ROTARY // 2
        partner = tl.where(is_first, dims + ROTARY // 2, dims - ROTARY // 2)
        turned = tl.load(head_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        turned = tl.where(is_first, -turned, turned)
        cos = tl.load(cos_ptr + position * ROTARY + dims, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * ROTARY + dims, mask=turns, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + turned * sin).to(x.dtype)
        # Every lane must read its partner before any lane writes.
        tl.debug_barrier()
        tl.store(head_ptr + dims, x, mask=inside)
    slot = tl.load(slot_mapping_ptr + row).to(tl.int64)
    if slot >= 0 and head >= N_HEADS:
        if head < N_HEADS + N_KV:
            store_row(k_cache_ptr, slot, head - N_HEADS, x, dims, N_KV, PAGE_SIZE, D)
        else:
            store_row(v_cache_ptr, slot, head - N_HEADS - N_KV, x, dims, N_KV, PAGE_SIZE, D)


@triton.jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    N_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping_ptr + row).to(tl.int64)
    if slot < 0:
        return
    dims = tl.arange(0, BLOCK_D)
    k = tl.load(k_ptr + row * stride_kt + head * stride_kh + dims, mask=dims < D, other=0.0)
    store_row(k_cache_ptr, slot, head, k, dims, N_KV, PAGE_SIZE, D)
    v = tl.load(v_ptr + row * stride_vt + head * stride_vh + dims, mask=dims < D, other=0.0)
    store_row(v_cache_ptr, slot, head, v, dims, N_KV, PAGE_SIZE, D)


def check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raise ValueError unless both are contiguous caches of one shape with a valid page size."""
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise ValueError(
            f"caches must share [n_pages, n_kv_heads, page_size, D] and dtype; they are "
            f"{tuple(k_cache.shape)} {k_cache.dtype} and {tuple(v_cache.shape)} {v_cache.dtype}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("both caches must be contiguous")
    page_size = k_cache.shape[2]
    if page_size & (page_size - 1) or not 2 <= page_size <= 128:
        raise ValueError(f"page size is {page_size}; it must be a power of two from 2 to 128")


def code_view(cache: Tensor) -> Tensor:
    """Return a cache as kernels read it: uint8 codes of e4m3, others as they are."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


def rope_and_cache_triton(
    q_k_v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """``rope_and_cache_reference`` on a GPU. Allocates nothing.

    Raises ValueError before the launch when a shape, stride or dtype does not fit.
    """
    check_cache(k_cache, v_cache)
    _, n_kv_heads, page_size, head_dim = k_cache.shape
    n_rows, width = q_k_v.shape
    n_heads = width // head_dim - 2 * n_kv_heads
    if n_heads < 1 or width % head_dim or (n_rows and q_k_v.stride(1) != 1):
        raise ValueError(
            f"q_k_v is {tuple(q_k_v.shape)}, it must be rows of heads for the cache of "
            f"{n_kv_heads} × {head_dim}, contiguous"
        )
    if slot_mapping.shape != (n_rows,) or positions.shape != (n_rows,):
        raise ValueError(f"slot_mapping and positions must both be [{n_rows}]")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    rotary = 0 if cos is None else cos.shape[1]
    for angle in (cos, sin):
        if angle is not None and (
            angle.shape[1] != rotary or rotary > head_dim or not angle.is_contiguous()
        ):
            raise ValueError(f"cos and sin must be contiguous [n_positions, ≤ {head_dim}]")
    if n_rows == 0:
        return
    rope_and_cache_kernel[(n_rows, n_heads + 2 * n_kv_heads)](
        q_k_v, q_k_v if cos is None else cos, q_k_v if sin is None else sin, positions,
        code_view(k_cache), code_view(v_cache), slot_mapping, q_k_v.stride(0),
        N_HEADS=n_heads, N_KV=n_kv_heads, PAGE_SIZE=page_size, D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), ROTARY=rotary,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def write_kv_triton(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """``write_kv_reference`` on a GPU: ``k``, ``v`` [T, n_kv_heads, D] to ``slot_mapping`` [T].

    Allocates nothing. Raises ValueError before the launch when a shape or stride does not fit.
    """
    check_cache(k_cache, v_cache)
    n_rows = slot_mapping.shape[0]
    wanted = (n_rows, k_cache.shape[1], k_cache.shape[3])
    if tuple(k.shape) != wanted or tuple(v.shape) != wanted:
        raise ValueError(f"k and v must be {wanted}, not {tuple(k.shape)} and {tuple(v.shape)}")
    if n_rows == 0:
        return
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("k and v must be contiguous along D")
    write_kv_kernel[(n_rows, k_cache.shape[1])](
        k, v, code_view(k_cache), code_view(v_cache), slot_mapping,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        N_KV=k_cache.shape[1], PAGE_SIZE=k_cache.shape[2], D=k_cache.shape[3],
        BLOCK_D=triton.next_power_of_2(k_cache.shape[3]), num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
