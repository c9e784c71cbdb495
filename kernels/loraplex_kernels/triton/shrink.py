"""Shrink: the low-rank intermediate of every pair, in float32 planes.

    planes[c, i, p, t, r] = Σ_{k in chunk c} A[slot(t), i][16p + r, k] · x[row(t), k]

Shapes: x [n_rows, K]; planes [n_planes, n_slices, max_pages, n_pairs, 16]. With n_planes = n_chunks
each program writes one chunk and expand adds them (few rows: many programs); with n_planes = 1 a
program adds its chunks itself in the same order (many rows). Only pages below a slot's true rank
are read or written, and tiles of padding exit at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.layout import LoraTables, LoraTarget

from .arithmetic import PAGE, partial_page, reduction
from .checks import OFFSET_ALIGN, check_inputs
from .routing import DeviceSegments
from .tuning import ShrinkChoice

__all__ = ["lora_shrink", "planes_shape"]


# What varies with the step or the pool is never specialised, so serving never waits for a compiler.
@triton.jit(do_not_specialize=["n_pairs", "max_pages", "rank_programs"])
def shrink_kernel(
    x_ptr,
    storage_ptr,
    ranks_ptr,
    a_pages_ptr,
    tiles_ptr,
    rows_ptr,
    planes_ptr,
    stride_xm,
    n_pairs,
    max_pages,
    rank_programs,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    N_SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SERIAL: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile * 3)
    if slot < 0:
        return
    slice_id = tl.program_id(1) // rank_programs
    rank = tl.load(ranks_ptr + slot * N_SLICES + slice_id)
    first_page = tl.program_id(1) % rank_programs
    if first_page * PAGE >= rank:
        return
    first = tl.load(tiles_ptr + tile * 3 + 1)
    count = tl.load(tiles_ptr + tile * 3 + 2)
    lanes = tl.arange(0, BLOCK_M)
    row_mask = lanes < count
    rows = tl.load(rows_ptr + first + lanes, mask=row_mask, other=0)
    pages_ptr = a_pages_ptr + (slot * N_SLICES + slice_id) * max_pages
    ranks = tl.arange(0, PAGE)
    for page in range(first_page, tl.cdiv(rank, PAGE), rank_programs):
        offset = tl.load(pages_ptr + page)
        left = rank - page * PAGE
        if SERIAL:
            plane = 0
            total = tl.zeros((PAGE, BLOCK_M), dtype=tl.float32)
            for chunk in range(N_CHUNKS):
                total += partial_page(
                    x_ptr, storage_ptr, offset, left, rows, row_mask, stride_xm, chunk,
                    K, CHUNK, BLOCK_K, BLOCK_M, OFFSET_ALIGN,
                )  # fmt: skip
        else:
            plane = tl.program_id(2)
            total = partial_page(
                x_ptr, storage_ptr, offset, left, rows, row_mask, stride_xm, plane,
                K, CHUNK, BLOCK_K, BLOCK_M, OFFSET_ALIGN,
            )  # fmt: skip
        place = ((plane * N_SLICES + slice_id) * max_pages + page).to(tl.int64) * n_pairs + first
        pointers = planes_ptr + (place + lanes[None, :]) * PAGE + ranks[:, None]
        tl.store(pointers, total, mask=row_mask[None, :])


def planes_shape(
    target: LoraTarget, tables: LoraTables, segments: DeviceSegments, *, n_planes: int
) -> tuple[int, int, int, int, int]:
    """Shape of the float32 workspace that ``lora_shrink`` fills and ``lora_expand`` reads."""
    max_pages = tables.a_pages.shape[2]
    return (n_planes, target.n_slices, max_pages, segments.indices.shape[0], int(PAGE.value))


def lora_shrink(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: DeviceSegments,
    choice: ShrinkChoice,
    *,
    planes: Tensor,
) -> None:
    """Fills ``planes`` (``planes_shape``; one plane when ``choice.serial``); allocates nothing.

    Raises ValueError before the launch when a shape, stride, dtype or device does not fit.
    """
    check_inputs(x, storage, target, tables, segments)
    cut = reduction(target.in_features, x.element_size())
    n_planes = 1 if choice.serial else cut.n_chunks
    wanted = planes_shape(target, tables, segments, n_planes=n_planes)
    if tuple(planes.shape) != wanted or not planes.is_contiguous():
        raise ValueError(f"planes must be contiguous {wanted}, not {tuple(planes.shape)}")
    if segments.tiles.shape[0] == 0:
        return
    rank_programs = min(choice.rank_programs, tables.a_pages.shape[2])
    grid = (segments.tiles.shape[0], target.n_slices * rank_programs, n_planes)
    shrink_kernel[grid](
        x, storage, tables.ranks, tables.a_pages, segments.tiles, segments.indices, planes,
        x.stride(0), segments.indices.shape[0], tables.a_pages.shape[2], rank_programs,
        K=target.in_features, CHUNK=cut.chunk, N_CHUNKS=cut.n_chunks, N_SLICES=target.n_slices,
        BLOCK_M=segments.block_m, BLOCK_K=cut.block, SERIAL=choice.serial,
        OFFSET_ALIGN=OFFSET_ALIGN,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
