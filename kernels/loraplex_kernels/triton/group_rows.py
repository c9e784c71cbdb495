"""Groups a step's (row, slot) pairs by slot, on the device and without a host sync.

    position(p) = #{q : e(q) < e(p)} + #{q < p : e(q) = e(p)}        counting sort by comparison

The input ``slots`` [n_rows, k] is int32, negative = none; pair p = row · k + j. Three launches have
grids that depend on shapes only: ``order_pairs_kernel`` finds the place of every pair,
``place_kernel`` writes segments and tiles by counting heads before each place, and
``row_blocks_kernel`` (k > 1) lists the segments that occur in each block of rows. There are no
atomics. Unused capacity is filled with slot -1, at which every kernel exits at once, so a CUDA
graph replays with any number of segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, RowBlocks, tile_rows

_BLOCK = 128  # pairs of one program
_LAST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["n_pairs"])
def order_pairs_kernel(
    slots_ptr,
    weights_ptr,
    indices_ptr,
    sorted_weights_ptr,
    pair_of_ptr,
    ordered_ptr,
    n_pairs,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """Fill ``ordered`` [n_pairs, 3]: slot, place within its segment, pairs left in it."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_pairs
    slot = tl.load(slots_ptr + pair, mask=inside, other=-1)
    key = tl.where(slot < 0, _LAST, slot)
    less = tl.zeros((BLOCK,), dtype=tl.int32)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    equal = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, n_pairs, OTHERS):
        other = first + tl.arange(0, OTHERS)
        other_slot = tl.load(slots_ptr + other, mask=other < n_pairs, other=-1)
        other_key = tl.where(other_slot < 0, _LAST, other_slot)
        is_equal = (other_key[None, :] == key[:, None]) & (other < n_pairs)[None, :]
        less += tl.sum((other_key[None, :] < key[:, None]).to(tl.int32), axis=1)
        equal += tl.sum(is_equal.to(tl.int32), axis=1)
        before += tl.sum((is_equal & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
    position = less + before
    is_pair = slot >= 0
    tl.store(pair_of_ptr + pair, tl.where(is_pair, position, -1), mask=inside)
    tl.store(indices_ptr + position, tl.where(is_pair, pair // K, 0), mask=inside)
    tl.store(ordered_ptr + position * 3, slot, mask=inside)
    tl.store(ordered_ptr + position * 3 + 1, before, mask=inside)
    tl.store(ordered_ptr + position * 3 + 2, equal - before, mask=inside)
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + pair, mask=inside, other=0.0)
        tl.store(sorted_weights_ptr + position, weight, mask=inside)


@triton.jit(do_not_specialize=["n_pairs", "n_segments", "n_tiles"])
def place_kernel(
    ordered_ptr,
    segment_slots_ptr,
    indptr_ptr,
    tiles_ptr,
    pair_segments_ptr,
    n_pairs,
    n_segments,
    n_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_own = tl.program_id(0) * BLOCK
    lanes = tl.arange(0, BLOCK)
    heads_before = 0
    tiles_before = 0
    heads = 0
    tiles = 0
    pairs = 0
    for first in range(0, n_pairs, BLOCK):
        place = first + lanes
        slot = tl.load(ordered_ptr + place * 3, mask=place < n_pairs, other=-1)
        within = tl.load(ordered_ptr + place * 3 + 1, mask=place < n_pairs, other=0)
        n_heads = tl.sum(((slot >= 0) & (within == 0)).to(tl.int32))
        n_tile_heads = tl.sum(((slot >= 0) & (within % BLOCK_M == 0)).to(tl.int32))
        heads_before += tl.where(first < first_own, n_heads, 0)
        tiles_before += tl.where(first < first_own, n_tile_heads, 0)
        heads += n_heads
        tiles += n_tile_heads
        pairs += tl.sum((slot >= 0).to(tl.int32))
    place = first_own + lanes
    inside = place < n_pairs
    slot = tl.load(ordered_ptr + place * 3, mask=inside, other=-1)
    within = tl.load(ordered_ptr + place * 3 + 1, mask=inside, other=0)
    left = tl.load(ordered_ptr + place * 3 + 2, mask=inside, other=0)
    is_head = (slot >= 0) & (within == 0)
    is_tile = (slot >= 0) & (within % BLOCK_M == 0)
    segment = heads_before + tl.cumsum(is_head.to(tl.int32), axis=0) - 1
    tile = tiles_before + tl.cumsum(is_tile.to(tl.int32), axis=0) - 1
    tl.store(pair_segments_ptr + place, segment, mask=inside & (slot >= 0))
    tl.store(segment_slots_ptr + segment, slot, mask=is_head & (segment < n_segments))
    tl.store(indptr_ptr + segment, place, mask=is_head & (segment < n_segments))
    fits = is_tile & (tile < n_tiles)
    tl.store(tiles_ptr + tile * 3, slot, mask=fits)
    tl.store(tiles_ptr + tile * 3 + 1, place, mask=fits)
    tl.store(tiles_ptr + tile * 3 + 2, tl.minimum(left, BLOCK_M), mask=fits)
    # Places beyond the counts are padding, written by the program that owns that index.
    is_spare = (place >= heads) & (place < n_segments)
    tl.store(segment_slots_ptr + place, -1, mask=is_spare)
    tl.store(indptr_ptr + place, pairs, mask=(place >= heads) & (place <= n_segments))
    for column in tl.static_range(3):
        value = -1 if column == 0 else 0
        spare_tile = (place >= tiles) & (place < n_tiles)
        tl.store(tiles_ptr + place * 3 + column, value, mask=spare_tile)


@triton.jit(do_not_specialize=["n_rows"])
def row_blocks_kernel(
    pair_of_ptr,
    pair_segments_ptr,
    segment_slots_ptr,
    n_items_ptr,
    item_slots_ptr,
    item_pairs_ptr,
    n_rows,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lanes = tl.arange(0, ROW_BLOCK)
    rows = block * ROW_BLOCK + lanes
    turns = tl.arange(0, K_PADDED)
    inside = (rows < n_rows)[:, None] & (turns < K)[None, :]
    pairs = tl.load(pair_of_ptr + rows[:, None] * K + turns[None, :], mask=inside, other=-1)
    segments = tl.load(pair_segments_ptr + pairs, mask=pairs >= 0, other=_LAST)
    n_items = 0
    segment = tl.min(segments)
    while segment < _LAST:
        item = block * (ROW_BLOCK * K) + n_items
        chosen = tl.min(tl.where(segments == segment, pairs, _LAST), axis=1)
        tl.store(item_slots_ptr + item, tl.load(segment_slots_ptr + segment))
        pair = tl.where(chosen == _LAST, -1, chosen)
        tl.store(item_pairs_ptr + item * ROW_BLOCK + lanes, pair)
        segments = tl.where(pairs == chosen[:, None], _LAST, segments)
        segment = tl.min(segments)
        n_items += 1
    tl.store(n_items_ptr + block, n_items)


def allocate_segments(
    n_rows: int,
    k: int,
    device: torch.device,
    *,
    has_weights: bool,
    n_slots: int | None = None,
    block_m: int | None = None,
    rows_per_block: int | None = None,
) -> DeviceSegments:
    """Allocate the segments of ``n_rows`` rows of at most ``k`` pairs each, without filling them.

    ``n_slots`` of the pool bounds the number of segments. Without it there may be as many segments
    as pairs. Tile sizes follow ``tile_rows`` and a rule when absent.
    """
    n_pairs = n_rows * k
    block_m = tile_rows(n_pairs) if block_m is None else block_m
    n_segments = n_pairs if n_slots is None else min(n_pairs, n_slots)
    n_tiles = min(n_pairs, n_segments + n_pairs // block_m)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    blocks = None
    if k > 1:
        per_block = _rows_per_block(n_rows) if rows_per_block is None else rows_per_block
        blocks = _allocate_blocks(n_rows, k, device, per_block)
    return DeviceSegments(
        slots=ints(n_segments),
        indptr=ints(n_segments + 1),
        indices=ints(n_pairs),
        weights=torch.empty(n_pairs, device=device) if has_weights else None,
        n_rows=n_rows,
        block_m=block_m,
        tiles=ints(n_tiles, 3),
        pair_of=ints(n_rows, k),
        pair_segments=ints(n_pairs),
        blocks=blocks,
    )


def fill_device_segments(
    row_slots: Tensor, weights: Tensor | None, *, segments: DeviceSegments, scratch: Tensor
) -> None:
    """Rebuild ``segments`` in place from ``row_slots`` int32 [n_rows] or [n_rows, k].

    ``weights`` is float32 of the same shape, ``scratch`` int32 [n_pairs, 3]. Nothing waits for the
    device and nothing is allocated. If a row names a slot twice, both pairs count. Raises
    ValueError before the launch when a shape or dtype does not fit.
    """
    n_rows, k = segments.pair_of.shape
    n_pairs = n_rows * k
    _check_fill(row_slots, weights, segments, scratch)
    if n_pairs == 0:
        segments.indptr.zero_()
        return
    n_segments, n_tiles = segments.slots.shape[0], segments.tiles.shape[0]
    has_weights = weights is not None
    order_pairs_kernel[(triton.cdiv(n_pairs, _BLOCK),)](
        row_slots, weights if has_weights else scratch,
        segments.indices, segments.weights if has_weights else scratch, segments.pair_of, scratch,
        n_pairs, K=k, BLOCK=_BLOCK, OTHERS=32, HAS_WEIGHTS=has_weights, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip
    places = max(n_pairs, n_segments + 1, n_tiles)
    place_kernel[(triton.cdiv(places, _BLOCK),)](
        scratch, segments.slots, segments.indptr, segments.tiles, segments.pair_segments,
        n_pairs, n_segments, n_tiles, BLOCK_M=segments.block_m, BLOCK=_BLOCK, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    _fill_blocks(segments)


def build_device_segments(
    row_slots: Tensor,
    weights: Tensor | None = None,
    *,
    n_slots: int | None = None,
    block_m: int | None = None,
    rows_per_block: int | None = None,
) -> DeviceSegments:
    """Allocate and fill the segments of a step. Nothing waits for the device."""
    slots = row_slots if row_slots.dim() == 2 else row_slots[:, None]
    n_rows, k = slots.shape
    segments = allocate_segments(
        n_rows,
        k,
        slots.device,
        has_weights=weights is not None,
        n_slots=n_slots,
        block_m=block_m,
        rows_per_block=rows_per_block,
    )
    scratch = torch.empty((n_rows * k, 3), dtype=torch.int32, device=slots.device)
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    fill_device_segments(
        slots.to(torch.int32).contiguous(), weights, segments=segments, scratch=scratch
    )
    return segments


def _allocate_blocks(n_rows: int, k: int, device: torch.device, rows_per_block: int) -> RowBlocks:
    n_blocks = -(-n_rows // rows_per_block)
    n_items = n_blocks * rows_per_block * k
    sizes: list[tuple[int, ...]] = [(n_blocks,), (n_items,), (n_items, rows_per_block)]
    tensors = [torch.empty(size, dtype=torch.int32, device=device) for size in sizes]
    return RowBlocks(rows_per_block, *tensors)


def _fill_blocks(segments: DeviceSegments) -> None:
    blocks, k = segments.blocks, segments.pair_of.shape[1]
    if blocks is None or segments.n_rows == 0:
        return
    row_blocks_kernel[(blocks.n_items.shape[0],)](
        segments.pair_of, segments.pair_segments, segments.slots,
        blocks.n_items, blocks.slots, blocks.pairs, segments.n_rows,
        K=k, K_PADDED=triton.next_power_of_2(k), ROW_BLOCK=blocks.n_rows, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def _rows_per_block(n_rows: int) -> int:
    """Few rows: short walks on many programs. Many rows: each page is read once a block."""
    return 2 if n_rows <= 128 else 16 if n_rows <= 1024 else 32


def _check_fill(
    slots: Tensor, weights: Tensor | None, segments: DeviceSegments, scratch: Tensor
) -> None:
    n_rows, k = segments.pair_of.shape
    n_pairs = n_rows * k
    if slots.numel() != n_pairs or slots.shape[0] != n_rows:
        raise ValueError(f"slots are {tuple(slots.shape)}, the segments hold {n_rows} × {k}")
    if (weights is None) != (segments.weights is None):
        raise ValueError("weights must be given exactly when the segments hold weights")
    if weights is not None and (weights.numel() != n_pairs or weights.dtype != torch.float32):
        raise ValueError(f"weights must be float32 [{n_rows}, {k}]")
    if scratch.numel() < 3 * n_pairs:
        raise ValueError(f"scratch has {scratch.numel()} elements, {3 * n_pairs} are needed")
    for tensor in (slots, scratch):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError("slots and scratch must be contiguous int32")
        if tensor.device != segments.indices.device:
            raise ValueError(f"segments are on {segments.indices.device}, input on {tensor.device}")
