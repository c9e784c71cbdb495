"""Shrink: computes the low-rank intermediate of every pair, in float32 planes.

    planes[c, i, p, t, r] = Σ_{k in chunk c} A[slot(t), i][16p + r, k] · x[row(t), k]

Shapes: x [n_rows, K]; planes [n_planes, n_slices, max_pages, n_pairs, 16]. With n_planes = n_chunks
each program writes one chunk and expand adds them, which gives few rows many programs. With
n_planes = 1 a program adds its chunks in the same order. Only pages below a slot's rank are read or
written. A program walks every ``num_programs``-th tile up to the padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraTables

from .arithmetic import PAGE, partial_page, reduction
from .checks import OFFSET_ALIGN, check_inputs
from .launch_choices import ShrinkChoice, shrink_choice, tile_programs


# Values that vary with the step or the pool are not specialised: serving never compiles.
@triton.jit(do_not_specialize=["n_pairs", "max_pages", "rank_programs", "n_tiles"])
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
    n_tiles,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    N_SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SERIAL: tl.constexpr,
    ROWS_ARE_PAIRS: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    slice_id = tl.program_id(1) // rank_programs
    first_page = tl.program_id(1) % rank_programs
    lanes = tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, PAGE)
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile * 3)
    while slot >= 0:
        rank = tl.load(ranks_ptr + slot * N_SLICES + slice_id)
        first = tl.load(tiles_ptr + tile * 3 + 1)
        row_mask = lanes < tl.load(tiles_ptr + tile * 3 + 2)
        if ROWS_ARE_PAIRS:
            rows = first + lanes
        else:
            rows = tl.load(rows_ptr + first + lanes, mask=row_mask, other=0)
        pages_ptr = a_pages_ptr + (slot * N_SLICES + slice_id) * max_pages
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
            place = ((plane * N_SLICES + slice_id) * max_pages + page).to(tl.int64) * n_pairs
            pointers = planes_ptr + (place + first + lanes[None, :]) * PAGE + ranks[:, None]
            tl.store(pointers, total, mask=row_mask[None, :])
        tile += tl.num_programs(0)
        slot = tl.load(tiles_ptr + tile * 3, mask=tile < n_tiles, other=-1)


def planes_shape(
    tables: LoraTables, segments: DeviceSegments, *, n_planes: int
) -> tuple[int, int, int, int, int]:
    """Return the shape of the float32 planes that ``lora_shrink`` fills."""
    _, n_slices, max_pages = tables.a_pages.shape
    return (n_planes, n_slices, max_pages, segments.indices.shape[0], int(PAGE.value))


def lora_shrink(
    x: Tensor,
    tables: LoraTables,
    segments: DeviceSegments,
    *,
    choice: ShrinkChoice | None = None,
    planes: Tensor | None = None,
    rows_are_pairs: bool = False,
) -> Tensor:
    """Fill and return ``planes`` (``planes_shape``; one plane if ``choice.serial``).

    ``choice`` follows the rule and ``planes`` are allocated when absent. ``rows_are_pairs``: ``x``
    has one row for each pair, by position in ``segments``. Raises ValueError before the launch when
    a shape, stride, dtype or device does not fit.
    """
    n_rows = segments.indices.shape[0] if rows_are_pairs else segments.n_rows
    check_inputs(x, tables, segments, n_rows=n_rows)
    target = tables.target
    cut = reduction(target.in_features, x.element_size())
    n_pairs, max_pages = segments.indices.shape[0], tables.a_pages.shape[2]
    if choice is None:
        choice = shrink_choice(n_pairs, target.in_features, max_pages, x.element_size())
    n_planes = 1 if choice.serial else cut.n_chunks
    shape = planes_shape(tables, segments, n_planes=n_planes)
    if planes is None:
        planes = torch.empty(shape, dtype=torch.float32, device=x.device)
    if tuple(planes.shape) != shape or not planes.is_contiguous():
        raise ValueError(f"planes must be contiguous {shape}, not {tuple(planes.shape)}")
    if segments.tiles.shape[0] == 0:
        return planes
    rank_programs = min(choice.rank_programs, max_pages)
    n_tiles = segments.tiles.shape[0]
    programs = tile_programs(n_tiles, n_pairs, segments.block_m)
    grid = (programs, target.n_slices * rank_programs, n_planes)
    shrink_kernel[grid](
        x, tables.storage, tables.ranks, tables.a_pages, segments.tiles, segments.indices, planes,
        x.stride(0), n_pairs, max_pages, rank_programs, n_tiles,
        K=target.in_features, CHUNK=cut.chunk, N_CHUNKS=cut.n_chunks, N_SLICES=target.n_slices,
        BLOCK_M=segments.block_m, BLOCK_K=cut.block, SERIAL=choice.serial,
        ROWS_ARE_PAIRS=rows_are_pairs, OFFSET_ALIGN=OFFSET_ALIGN,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return planes
