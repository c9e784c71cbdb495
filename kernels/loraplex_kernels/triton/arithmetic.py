"""The sums of all LoRA kernels, so that every path gives a row the same bits.

    partial[c, r] = Σ_{k in chunk c} A[r, k] · x[k]        one tensor-core accumulator, k ascending
    h[r]          = ((partial[0] + partial[1]) + …)        float32, chunks ascending
    delta[n]      = Σ_pages Σ_{r in page} h[r] · B[r, n]   one accumulator, pages ascending

``reduction`` cuts K by (K, dtype) alone, never by the batch. Tile sizes, warps and the place where
chunks are added (one program, or planes that a second kernel adds) do not change these sums. A row
of a tile reads no other row. So a row has the same bits alone and in every batch. Every launch
turns fp fusion off, because the compiler may contract a product and a sum in one kernel and not in
another.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from loraplex_kernels.formats.layout import PAGE_RANK

PAGE = tl.constexpr(PAGE_RANK)


class Reduction(NamedTuple):
    """The division of the columns of x into sums. It depends on width and element size only."""

    chunk: int  # columns of one partial sum
    block: int  # columns of one load
    n_chunks: int


def reduction(in_features: int, element_size: int) -> Reduction:
    """Divide ``in_features`` columns into few partial sums that still fill a GPU."""
    if in_features <= 1024:
        chunk = 256
    elif in_features <= 8192:
        chunk = 512
    else:
        chunk = 1024 * -(-in_features // 16384)
    return Reduction(chunk, 128 if element_size == 2 else 32, -(-in_features // chunk))


@triton.jit
def aligned(offset, ALIGN: tl.constexpr):
    """Return ``offset`` as a visible multiple, since the compiler drops hints on loads."""
    return offset // ALIGN * ALIGN


@triton.jit
def partial_page(
    x_ptr,
    storage_ptr,
    offset,
    n_ranks,
    rows,
    row_mask,
    stride_xm,
    chunk,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    """Sum one chunk of columns for one page of rank rows: [PAGE, BLOCK_M] float32.

    The page is the left operand, 16 × BLOCK_K times BLOCK_K × BLOCK_M, so that every BLOCK_M
    compiles to the same tensor-core instruction. With rows on the left, 64 rows would be wgmma.
    """
    ranks = tl.arange(0, PAGE)
    columns = chunk * CHUNK + tl.arange(0, BLOCK_K)
    offset = aligned(offset, OFFSET_ALIGN)
    a_ptrs = storage_ptr + offset + ranks[:, None] * K + columns[None, :]
    x_ptrs = x_ptr + rows[None, :].to(tl.int64) * stride_xm + columns[:, None]
    rank_mask = ranks[:, None] < n_ranks
    total = tl.zeros((PAGE, BLOCK_M), dtype=tl.float32)
    for first in range(0, min(CHUNK, K - chunk * CHUNK), BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs + first, mask=rank_mask, other=0.0)
            x = tl.load(x_ptrs + first, mask=row_mask[None, :], other=0.0)
        else:
            inside = columns + first < K
            a = tl.load(a_ptrs + first, mask=rank_mask & inside[None, :], other=0.0)
            x = tl.load(x_ptrs + first, mask=row_mask[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, x, total, input_precision="ieee")
    return total


@triton.jit
def dot_float32(h, b, total):
    """Return ``total + h @ b`` of float32 ``h`` [M, 16] and ``b`` [16, N] in float32 precision.

    bf16: h = high + low, two bf16 products (16 bits of h). fp16: tf32x3, since h may exceed 65504.
    """
    if b.dtype == tl.bfloat16:
        high = h.to(tl.bfloat16)
        low = (h - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, b, tl.dot(low, b, total))
    elif b.dtype == tl.float16:  # noqa: RET505 - branches of compile time
        return tl.dot(h, b.to(tl.float32), total, input_precision="tf32x3")
    else:
        return tl.dot(h, b, total, input_precision="ieee")
