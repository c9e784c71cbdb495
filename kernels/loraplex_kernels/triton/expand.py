"""Expand: adds the product of every pair to the base output, in place.

    y     = out[row, n]
    y     = scale ⊙ (y + w[t] · Σ_r h[t, r] · B[slot(t), i][r, n]) + bias     per pair t of the row
    h[t]  = planes[0, …, t] + planes[1, …, t] + …                             chunks ascending

Columns of all slices share one grid axis, so narrow slices (k, v beside q) waste no tiles.
``expand_kernel`` serves steps whose rows are in one segment each: a program walks tiles of rows.
``expand_routed_kernel`` serves routed experts: a program owns a block of rows and walks its
segments in order. So a row's pairs are added in float32 in a fixed order without atomics, and out
is read and written once.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraTables, LoraTarget

from .arithmetic import PAGE, aligned, dot_float32
from .checks import OFFSET_ALIGN, check_inputs, check_out
from .launch_choices import ExpandChoice, expand_choice, tile_programs


@triton.jit
def find_columns(
    column_tile,
    WIDTHS: tl.constexpr,
    N_SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
):
    """Return (slice, columns within it, its width, its first column) of a flat column tile."""
    slice_id = 0
    first_tile = 0
    first_column = 0
    width = 0 + WIDTHS[0]
    tiles = 0
    columns_before = 0
    for i in tl.static_range(N_SLICES):
        if i > 0:
            is_later = column_tile >= tiles
            slice_id = tl.where(is_later, i, slice_id)
            first_tile = tl.where(is_later, tiles, first_tile)
            first_column = tl.where(is_later, columns_before, first_column)
            width = tl.where(is_later, WIDTHS[i], width)
        tiles += (WIDTHS[i] + BLOCK_N - 1) // BLOCK_N
        columns_before += WIDTHS[i]
    columns = (column_tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.multiple_of(width, WIDTH_ALIGN)
    first_column = tl.multiple_of(first_column, WIDTH_ALIGN)
    return slice_id, columns, width, first_column


@triton.jit
def transform(
    y, storage_ptr, scale_offset, bias_offset, columns, width, OFFSET_ALIGN: tl.constexpr
):
    """Return ``scale ⊙ y + bias`` for slots that have them; a negative offset means none."""
    if scale_offset >= 0:
        scale_offset = aligned(scale_offset, OFFSET_ALIGN)
        scale = tl.load(storage_ptr + scale_offset + columns, mask=columns < width, other=0.0)
        y = y * scale.to(tl.float32)[None, :]
    if bias_offset >= 0:
        bias_offset = aligned(bias_offset, OFFSET_ALIGN)
        bias = tl.load(storage_ptr + bias_offset + columns, mask=columns < width, other=0.0)
        y = y + bias.to(tl.float32)[None, :]
    return y


@triton.jit
def add_page(total, h, storage_ptr, offset, n_ranks, columns, width, OFFSET_ALIGN: tl.constexpr):
    """Return ``total + h @ B`` for one page; h [BLOCK_M, PAGE]."""
    ranks = tl.arange(0, PAGE)
    offset = aligned(offset, OFFSET_ALIGN)
    pointers = storage_ptr + offset + ranks[:, None] * width + columns[None, :]
    mask = (ranks[:, None] < n_ranks) & (columns[None, :] < width)
    return dot_float32(h, tl.load(pointers, mask=mask, other=0.0), total)


@triton.jit
def add_pair(
    planes_ptr,
    storage_ptr,
    b_pages_ptr,
    weights_ptr,
    rank,
    table_row,
    slice_id,
    pairs,
    pair_mask,
    columns,
    width,
    n_pairs,
    max_pages,
    N_SLICES: tl.constexpr,
    N_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    """Return w · Σ_r h · B, [BLOCK_M, BLOCK_N] float32, for pairs that share a slot."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ranks = tl.arange(0, PAGE)
    for page in range(tl.cdiv(rank, PAGE)):
        h = tl.zeros((BLOCK_M, PAGE), dtype=tl.float32)
        for plane in tl.static_range(N_PLANES):
            place = ((plane * N_SLICES + slice_id) * max_pages + page).to(tl.int64) * n_pairs
            pointers = planes_ptr + (place + pairs[:, None]) * PAGE + ranks[None, :]
            h += tl.load(pointers, mask=pair_mask[:, None], other=0.0)
        offset = tl.load(b_pages_ptr + table_row * max_pages + page)
        left = rank - page * PAGE
        total = add_page(total, h, storage_ptr, offset, left, columns, width, OFFSET_ALIGN)
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + pairs, mask=pair_mask, other=0.0)
        total = total * weights[:, None]
    return total


@triton.jit(do_not_specialize=["n_pairs", "max_pages", "n_tiles"])
def expand_kernel(
    planes_ptr,
    storage_ptr,
    ranks_ptr,
    b_pages_ptr,
    scale_ptr,
    bias_ptr,
    tiles_ptr,
    rows_ptr,
    weights_ptr,
    out_ptr,
    stride_om,
    n_pairs,
    max_pages,
    n_tiles,
    WIDTHS: tl.constexpr,
    N_SLICES: tl.constexpr,
    N_PLANES: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    slice_id, columns, width, first_column = find_columns(
        tl.program_id(1), WIDTHS, N_SLICES, BLOCK_N, WIDTH_ALIGN
    )
    lanes = tl.arange(0, BLOCK_M)
    skipped = tl.program_id(0) % (TILE_M // BLOCK_M) * BLOCK_M
    tile = tl.program_id(0) // (TILE_M // BLOCK_M)
    slot = tl.load(tiles_ptr + tile * 3)
    while slot >= 0:
        count = tl.load(tiles_ptr + tile * 3 + 2) - skipped
        table_row = slot * N_SLICES + slice_id
        rank = tl.load(ranks_ptr + table_row)
        scale_offset = tl.load(scale_ptr + table_row)
        bias_offset = tl.load(bias_ptr + table_row)
        if (count > 0) & ((rank > 0) | (scale_offset >= 0) | (bias_offset >= 0)):
            pairs = tl.load(tiles_ptr + tile * 3 + 1) + skipped + lanes
            row_mask = lanes < count
            rows = tl.load(rows_ptr + pairs, mask=row_mask, other=0)
            delta = add_pair(
                planes_ptr, storage_ptr, b_pages_ptr, weights_ptr, rank, table_row, slice_id,
                pairs, row_mask, columns, width, n_pairs, max_pages,
                N_SLICES, N_PLANES, BLOCK_M, BLOCK_N, HAS_WEIGHTS, OFFSET_ALIGN,
            )  # fmt: skip
            of_rows = out_ptr + rows[:, None].to(tl.int64) * stride_om
            pointers = of_rows + (first_column + columns)[None, :]
            mask = row_mask[:, None] & (columns[None, :] < width)
            y = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + delta
            y = transform(y, storage_ptr, scale_offset, bias_offset, columns, width, OFFSET_ALIGN)
            tl.store(pointers, y, mask=mask)
        tile += tl.num_programs(0) // (TILE_M // BLOCK_M)
        slot = tl.load(tiles_ptr + tile * 3, mask=tile < n_tiles, other=-1)


@triton.jit(do_not_specialize=["n_pairs", "n_rows", "max_pages"])
def expand_routed_kernel(
    planes_ptr,
    storage_ptr,
    ranks_ptr,
    b_pages_ptr,
    scale_ptr,
    bias_ptr,
    n_items_ptr,
    item_slots_ptr,
    item_pairs_ptr,
    weights_ptr,
    out_ptr,
    stride_om,
    n_pairs,
    n_rows,
    max_pages,
    WIDTHS: tl.constexpr,
    N_SLICES: tl.constexpr,
    N_PLANES: tl.constexpr,
    ITEMS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    block = tl.program_id(0)
    n_items = tl.load(n_items_ptr + block)
    if n_items == 0:
        return
    slice_id, columns, width, first_column = find_columns(
        tl.program_id(1), WIDTHS, N_SLICES, BLOCK_N, WIDTH_ALIGN
    )
    lanes = tl.arange(0, BLOCK_M)
    rows = block * ROW_BLOCK + lanes
    row_mask = (lanes < ROW_BLOCK) & (rows < n_rows)
    pointers = out_ptr + rows[:, None].to(tl.int64) * stride_om + (first_column + columns)[None, :]
    mask = row_mask[:, None] & (columns[None, :] < width)
    y = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for item in range(block * ITEMS, block * ITEMS + n_items):
        slot = tl.load(item_slots_ptr + item)
        pairs = tl.load(item_pairs_ptr + item * ROW_BLOCK + lanes, mask=row_mask, other=-1)
        table_row = slot * N_SLICES + slice_id
        rank = tl.load(ranks_ptr + table_row)
        delta = add_pair(
            planes_ptr, storage_ptr, b_pages_ptr, weights_ptr, rank, table_row, slice_id,
            pairs, pairs >= 0, columns, width, n_pairs, max_pages,
            N_SLICES, N_PLANES, BLOCK_M, BLOCK_N, HAS_WEIGHTS, OFFSET_ALIGN,
        )  # fmt: skip
        changed = transform(
            y + delta, storage_ptr, tl.load(scale_ptr + table_row), tl.load(bias_ptr + table_row),
            columns, width, OFFSET_ALIGN,
        )  # fmt: skip
        # Selected instead of multiplied by zero: another adapter's inf must not become 0 · inf.
        y = tl.where((pairs >= 0)[:, None], changed, y)
    tl.store(pointers, y, mask=mask)


def n_column_tiles(target: LoraTarget, block_n: int) -> int:
    """Return the number of column tiles of all slices. A tile never spans two slices."""
    return sum(-(-width // block_n) for width in target.out_features)


def lora_expand(
    planes: Tensor,
    x: Tensor,
    tables: LoraTables,
    segments: DeviceSegments,
    *,
    out: Tensor,
    choice: ExpandChoice | None = None,
) -> None:
    """Add the products of the pairs in ``planes`` to ``out`` in place. Allocates nothing.

    ``choice`` follows the rule when absent. Raises ValueError before the launch when a shape,
    stride, dtype or device does not fit.
    """
    target = tables.target
    check_inputs(x, tables, segments)
    check_out(out, x, target)
    if segments.tiles.shape[0] == 0:
        return
    if choice is None:
        choice = expand_choice(segments.indices.shape[0], x.element_size())
    weights = segments.weights
    shared = (planes, tables.storage, tables.ranks, tables.b_pages, tables.scale, tables.bias)
    constants = {
        "WIDTHS": target.out_features,
        "N_SLICES": target.n_slices,
        "N_PLANES": planes.shape[0],
        "HAS_WEIGHTS": weights is not None,
        "WIDTH_ALIGN": math.gcd(16, *target.out_features),
        "OFFSET_ALIGN": OFFSET_ALIGN,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
        "enable_fp_fusion": False,
    }
    weights = planes if weights is None else weights
    blocks = segments.blocks
    if blocks is None:
        n_tiles, n_pairs = segments.tiles.shape[0], segments.indices.shape[0]
        block_m = min(choice.block_m, segments.block_m)
        programs = tile_programs(n_tiles, n_pairs, segments.block_m)
        n_columns = n_column_tiles(target, choice.block_n)
        grid = (programs * (segments.block_m // block_m), n_columns)
        expand_kernel[grid](
            *shared, segments.tiles, segments.indices, weights, out,
            out.stride(0), n_pairs, tables.b_pages.shape[2], n_tiles,
            TILE_M=segments.block_m, BLOCK_M=block_m, BLOCK_N=choice.block_n, **constants,
        )  # fmt: skip
    else:
        # A program holds two float32 tiles, y and the product.
        block_n = min(choice.block_n, 64 if x.element_size() == 2 else 32)
        grid = (blocks.n_items.shape[0], n_column_tiles(target, block_n))
        # Without maxnreg the assembler spills some bytes to fit one more block.
        expand_routed_kernel[grid](
            *shared, blocks.n_items, blocks.slots, blocks.pairs, weights, out,
            out.stride(0), segments.indices.shape[0], out.shape[0], tables.b_pages.shape[2],
            ITEMS=blocks.n_rows * segments.pair_of.shape[1], ROW_BLOCK=blocks.n_rows,
            BLOCK_M=max(16, blocks.n_rows), BLOCK_N=block_n,
            maxnreg=255, **constants,
        )  # fmt: skip
