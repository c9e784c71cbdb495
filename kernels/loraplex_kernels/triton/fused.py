"""Shrink and expand in one launch, for narrow inputs and small ranks, where the launch is the cost.

    out[row, n] += w · Σ_pages Σ_{r in page} (Σ_k A[r, k] · x[row, k]) · B[r, n]

A program owns a tile of rows and a tile of columns. It computes the intermediate of its rows for
itself, page by page in registers, so A is read once for each column tile (from L2) and no plane is
written. The sums are those of the two launches, so the bits are the same.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.layout import LoraTables, LoraTarget

from .arithmetic import PAGE, partial_page, reduction
from .checks import OFFSET_ALIGN, check_inputs, check_out
from .expand import add_page, find_columns, n_column_tiles, transform
from .routing import DeviceSegments
from .tuning import FusedChoice

__all__ = ["lora_fused"]


@triton.jit(do_not_specialize=["max_pages"])
def fused_kernel(
    x_ptr,
    storage_ptr,
    ranks_ptr,
    a_pages_ptr,
    b_pages_ptr,
    scale_ptr,
    bias_ptr,
    tiles_ptr,
    rows_ptr,
    weights_ptr,
    out_ptr,
    stride_xm,
    stride_om,
    max_pages,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    WIDTHS: tl.constexpr,
    N_SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile * 3)
    if slot < 0:
        return
    slice_id, columns, width, first_column = find_columns(
        tl.program_id(1), WIDTHS, N_SLICES, BLOCK_N, WIDTH_ALIGN
    )
    table_row = slot * N_SLICES + slice_id
    rank = tl.load(ranks_ptr + table_row)
    scale_offset = tl.load(scale_ptr + table_row)
    bias_offset = tl.load(bias_ptr + table_row)
    if rank == 0 and scale_offset < 0 and bias_offset < 0:
        return
    lanes = tl.arange(0, BLOCK_M)
    pairs = tl.load(tiles_ptr + tile * 3 + 1) + lanes
    row_mask = lanes < tl.load(tiles_ptr + tile * 3 + 2)
    rows = tl.load(rows_ptr + pairs, mask=row_mask, other=0)
    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for page in range(tl.cdiv(rank, PAGE)):
        left = rank - page * PAGE
        offset = tl.load(a_pages_ptr + table_row * max_pages + page)
        h = tl.zeros((PAGE, BLOCK_M), dtype=tl.float32)
        for chunk in range(N_CHUNKS):
            h += partial_page(
                x_ptr, storage_ptr, offset, left, rows, row_mask, stride_xm, chunk,
                K, CHUNK, BLOCK_K, BLOCK_M, OFFSET_ALIGN,
            )  # fmt: skip
        offset = tl.load(b_pages_ptr + table_row * max_pages + page)
        delta = add_page(
            delta, tl.trans(h), storage_ptr, offset, left, columns, width, OFFSET_ALIGN
        )
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + pairs, mask=row_mask, other=0.0)
        delta = delta * weights[:, None]
    pointers = out_ptr + rows[:, None].to(tl.int64) * stride_om + (first_column + columns)[None, :]
    mask = row_mask[:, None] & (columns[None, :] < width)
    y = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + delta
    y = transform(y, storage_ptr, scale_offset, bias_offset, columns, width, OFFSET_ALIGN)
    tl.store(pointers, y, mask=mask)


def lora_fused(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: DeviceSegments,
    choice: FusedChoice,
    *,
    out: Tensor,
) -> None:
    """Adds the product of every pair to ``out`` in place; allocates nothing, needs no workspace.

    Only for rows in at most one segment each (``segments.blocks is None``). Raises ValueError
    before the launch when that, a shape, a stride, a dtype or a device does not fit.
    """
    check_inputs(x, storage, target, tables, segments)
    check_out(out, x, target)
    if segments.blocks is not None:
        raise ValueError("the fused kernel needs rows in one segment each; use shrink and expand")
    if segments.tiles.shape[0] == 0:
        return
    cut = reduction(target.in_features, x.element_size())
    weights = segments.weights
    grid = (segments.tiles.shape[0], n_column_tiles(target, choice.block_n))
    fused_kernel[grid](
        x, storage, tables.ranks, tables.a_pages, tables.b_pages, tables.scale, tables.bias,
        segments.tiles, segments.indices, segments.indices if weights is None else weights, out,
        x.stride(0), out.stride(0), tables.a_pages.shape[2],
        K=target.in_features, CHUNK=cut.chunk, N_CHUNKS=cut.n_chunks, WIDTHS=target.out_features,
        N_SLICES=target.n_slices, BLOCK_M=segments.block_m,
        BLOCK_N=choice.block_n, BLOCK_K=cut.block, HAS_WEIGHTS=weights is not None,
        WIDTH_ALIGN=math.gcd(16, *target.out_features), OFFSET_ALIGN=OFFSET_ALIGN,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
