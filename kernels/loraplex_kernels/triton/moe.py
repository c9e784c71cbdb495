"""The experts of an MLP block over the pairs of a step (``moe_by_slot``), in five launches.

    ``shrink_kernel``         h of every pair, from its row of x
    ``expand_gate_kernel``    pair_act = silu(g + Δg) · (u + Δu), g and u of the pair's row
    ``mix_kernel``            act[t] = Σ_j w_j pair_act[pair j of t]; without pairs: silu(g) · u
    shrink, expand            out[t] += Σ_j w_j Δ_j(pair_act[pair j of t])
    ``sum_kernel``            or out[t] = Σ_j w_j of_pairs[pair j of t]; without pairs: unchanged

Shapes: x [T, K], gate_up [T, 2F], pair_act [T · CHOICES, F] by position in the segments. Pairs
beyond the valid ones are neither read nor written. A row's sums stand in the order of its choices,
a block's in the order of segments: no atomics, so a row's bits do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.layout import LoraSegments, LoraTables, LoraTarget

from .arithmetic import aligned
from .checks import OFFSET_ALIGN, check_inputs
from .expand import add_pair, lora_expand, transform
from .input_scales import check_scales
from .lora import two_launches
from .routing import DeviceSegments
from .shrink import lora_shrink
from .silu_mul import gated
from .tuning import ExpandChoice, TuningTable

if TYPE_CHECKING:
    from loraplex_kernels.moe_by_slot import InputScales

__all__ = [
    "add_pairs_triton",
    "expand_gate",
    "gate_pairs_triton",
    "mix_pairs_triton",
    "segments_of_pairs",
    "sum_pairs_triton",
]

_BLOCK = 1024


@triton.jit
def pair_product(
    planes_ptr, storage_ptr, ranks_ptr, b_pages_ptr, scale_ptr, bias_ptr, gate_up_ptr, stride_gt,
    slot, rows, pairs, row_mask, columns, n_pairs, max_pages,
    SLICE: tl.constexpr, F: tl.constexpr, N_PLANES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, OFFSET_ALIGN: tl.constexpr,
):  # fmt: skip
    """The base's product of each pair's row with its adapter on top, in the rows' dtype."""
    table_row = slot * 2 + SLICE
    delta = add_pair(
        planes_ptr, storage_ptr, b_pages_ptr, planes_ptr, tl.load(ranks_ptr + table_row), table_row,
        SLICE, pairs, row_mask, columns, F, n_pairs, max_pages,
        2, N_PLANES, BLOCK_M, BLOCK_N, False, OFFSET_ALIGN,
    )  # fmt: skip
    pointers = gate_up_ptr + rows[:, None].to(tl.int64) * stride_gt + (SLICE * F + columns)[None, :]
    base = tl.load(pointers, mask=row_mask[:, None] & (columns[None, :] < F), other=0.0)
    y = transform(
        base.to(tl.float32) + delta, storage_ptr, tl.load(scale_ptr + table_row),
        tl.load(bias_ptr + table_row), columns, F, OFFSET_ALIGN,
    )  # fmt: skip
    return y.to(base.dtype)


@triton.jit(do_not_specialize=["n_pairs", "max_pages"])
def expand_gate_kernel(
    planes_ptr,
    storage_ptr,
    ranks_ptr,
    b_pages_ptr,
    scale_ptr,
    bias_ptr,
    tiles_ptr,
    rows_ptr,
    gate_up_ptr,
    out_ptr,
    stride_gt,
    stride_ot,
    n_pairs,
    max_pages,
    F: tl.constexpr,
    N_PLANES: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    tile = tl.program_id(0) // (TILE_M // BLOCK_M)
    skipped = tl.program_id(0) % (TILE_M // BLOCK_M) * BLOCK_M
    slot = tl.load(tiles_ptr + tile * 3)
    count = tl.load(tiles_ptr + tile * 3 + 2) - skipped
    if slot < 0 or count <= 0:
        return
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_M)
    pairs = tl.load(tiles_ptr + tile * 3 + 1) + skipped + lanes
    row_mask = lanes < count
    rows = tl.load(rows_ptr + pairs, mask=row_mask, other=0)
    gate = pair_product(
        planes_ptr, storage_ptr, ranks_ptr, b_pages_ptr, scale_ptr, bias_ptr, gate_up_ptr,
        stride_gt, slot, rows, pairs, row_mask, columns, n_pairs, max_pages,
        0, F, N_PLANES, BLOCK_M, BLOCK_N, OFFSET_ALIGN,
    )  # fmt: skip
    up = pair_product(
        planes_ptr, storage_ptr, ranks_ptr, b_pages_ptr, scale_ptr, bias_ptr, gate_up_ptr,
        stride_gt, slot, rows, pairs, row_mask, columns, n_pairs, max_pages,
        1, F, N_PLANES, BLOCK_M, BLOCK_N, OFFSET_ALIGN,
    )  # fmt: skip
    pointers = out_ptr + pairs[:, None].to(tl.int64) * stride_ot + columns[None, :]
    mask = row_mask[:, None] & (columns[None, :] < F)
    tl.store(pointers, gated(gate, up, False).to(gate.dtype), mask=mask)


@triton.jit
def sum_of_row(
    of_pairs_ptr, pair_of_ptr, weights_ptr, row, first, stride_pt, columns, inside,
    CHOICES: tl.constexpr,
):  # fmt: skip
    """Σ_j w_j · pair j of ``row``, in float32, j ascending; in the pairs' dtype."""
    first_ptrs = of_pairs_ptr + first.to(tl.int64) * stride_pt + columns
    values = tl.load(first_ptrs, mask=inside, other=0.0)
    total = values.to(tl.float32) * tl.load(weights_ptr + first)
    for j in range(1, CHOICES):
        pair = tl.load(pair_of_ptr + row * CHOICES + j)
        if pair >= 0:
            pointers = of_pairs_ptr + pair.to(tl.int64) * stride_pt + columns
            other = tl.load(pointers, mask=inside, other=0.0)
            total += other.to(tl.float32) * tl.load(weights_ptr + pair)
    return total.to(values.dtype)


@triton.jit
def mix_kernel(
    gate_up_ptr, pair_act_ptr, pair_of_ptr, weights_ptr, out_ptr,
    row_slots_ptr, offsets_ptr, storage_ptr,
    stride_gt, stride_pt, stride_ot, stride_os,
    F: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, HAS_SCALES: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    out_ptrs = out_ptr + row * stride_ot + columns
    first = tl.load(pair_of_ptr + row * CHOICES)
    if first < 0:
        pointers = gate_up_ptr + row * stride_gt + columns
        gate = tl.load(pointers, mask=inside, other=0.0)
        up = tl.load(pointers + F, mask=inside, other=0.0)
        tl.store(out_ptrs, gated(gate, up, False).to(gate.dtype), mask=inside)
        return
    mixed = sum_of_row(
        pair_act_ptr, pair_of_ptr, weights_ptr, row, first, stride_pt, columns, inside, CHOICES
    )
    if HAS_SCALES:
        slot = tl.load(row_slots_ptr + row).to(tl.int64)
        offset = tl.load(offsets_ptr + slot * stride_os, mask=slot >= 0, other=-1)
        if offset >= 0:  # of a row of one pair: its low-rank product reads it scaled, too
            pointers = storage_ptr + aligned(offset, OFFSET_ALIGN) + columns
            scale = tl.load(pointers, mask=inside, other=0.0)
            mixed = (mixed.to(tl.float32) * scale.to(tl.float32)).to(mixed.dtype)
            first_ptrs = pair_act_ptr + first.to(tl.int64) * stride_pt + columns
            tl.store(first_ptrs, mixed, mask=inside)
    tl.store(out_ptrs, mixed, mask=inside)


@triton.jit
def sum_kernel(
    of_pairs_ptr, pair_of_ptr, weights_ptr, out_ptr, stride_pt, stride_ot,
    F: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(pair_of_ptr + row * CHOICES)
    if first < 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    total = sum_of_row(
        of_pairs_ptr, pair_of_ptr, weights_ptr, row, first, stride_pt, columns, inside, CHOICES
    )
    tl.store(out_ptr + row * stride_ot + columns, total, mask=inside)


def gate_pairs_triton(
    x: Tensor,
    gate_up: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: LoraSegments,
    *,
    table: TuningTable | None = None,
    capability: int | None = None,
) -> Tensor:
    """``moe_by_slot.gate_pairs``: shrink, and expand with the gate of the MLP behind it.

    ``segments``: ``DeviceSegments`` over the rows of ``x``. Raises ValueError before the launches.
    """
    routed = _device_segments(segments)
    choice = two_launches(x, target, tables, routed, table, capability)
    planes = torch.empty(choice.planes_shape, dtype=torch.float32, device=x.device)
    lora_shrink(x, storage, target, tables, routed, choice.shrink, planes=planes)
    n_pairs = routed.indices.shape[0]
    out = torch.empty((n_pairs, target.out_features[0]), dtype=gate_up.dtype, device=x.device)
    expand_gate(planes, x, gate_up, storage, target, tables, routed, choice.expand, out=out)
    return out


def expand_gate(
    planes: Tensor,
    x: Tensor,
    gate_up: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: DeviceSegments,
    choice: ExpandChoice,
    *,
    out: Tensor,
) -> None:
    """Fills ``out`` [n_pairs, F] from what ``lora_shrink`` left in ``planes``; allocates nothing.

    Raises ValueError before the launch when a shape, stride, dtype or device does not fit.
    """
    check_inputs(x, storage, target, tables, segments)
    width, n_pairs = out.shape[1], segments.indices.shape[0]
    if target.out_features != (width, width):
        raise ValueError(f"{target.name} is no pair of gate and up of {width} columns")
    if tuple(gate_up.shape) != (x.shape[0], 2 * width) or out.shape[0] != n_pairs:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, out {tuple(out.shape)}")
    if gate_up.dtype != x.dtype or out.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, gate_up {gate_up.dtype}, out {out.dtype}")
    if segments.tiles.shape[0] == 0:
        return
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous along the width")
    block_m = min(choice.block_m, segments.block_m)
    block_n = min(choice.block_n, 64 if x.element_size() == 2 else 32)  # two products at once
    grid = (segments.tiles.shape[0] * (segments.block_m // block_m), triton.cdiv(width, block_n))
    expand_gate_kernel[grid](
        planes, storage, tables.ranks, tables.b_pages, tables.scale, tables.bias,
        segments.tiles, segments.indices, gate_up, out, gate_up.stride(0), out.stride(0),
        n_pairs, tables.b_pages.shape[2],
        F=width, N_PLANES=planes.shape[0], TILE_M=segments.block_m, BLOCK_M=block_m,
        BLOCK_N=block_n, OFFSET_ALIGN=OFFSET_ALIGN, num_warps=choice.num_warps,
        num_stages=choice.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def mix_pairs_triton(
    gate_up: Tensor, pair_act: Tensor, segments: LoraSegments, scales: InputScales | None
) -> Tensor:
    """``moe_by_slot.mix_pairs``. Raises ValueError before the launch."""
    routed = _device_segments(segments)
    n_rows, n_choices = routed.pair_of.shape
    width = pair_act.shape[1]
    if tuple(gate_up.shape) != (n_rows, 2 * width) or pair_act.shape[0] != n_rows * n_choices:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, pairs {tuple(pair_act.shape)}")
    if gate_up.dtype != pair_act.dtype or routed.weights is None:
        raise ValueError("pairs must have weights, and their activations the dtype of gate_up")
    out = torch.empty((n_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if n_rows == 0:
        return out
    if gate_up.stride(1) != 1 or pair_act.stride(1) != 1:
        raise ValueError("rows must be contiguous along the width")
    extra = (routed.pair_of, routed.pair_of, out)
    if scales is not None:
        check_scales(out, scales.row_slots, scales.storage, scales.offsets)
        extra = (scales.row_slots, scales.offsets, scales.storage)
    block = min(_BLOCK, triton.next_power_of_2(width))
    mix_kernel[(n_rows, triton.cdiv(width, block))](
        gate_up, pair_act, routed.pair_of, routed.weights, out, *extra,
        gate_up.stride(0), pair_act.stride(0), out.stride(0), extra[1].stride(0),
        F=width, BLOCK=block, CHOICES=n_choices, HAS_SCALES=scales is not None,
        OFFSET_ALIGN=OFFSET_ALIGN, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def add_pairs_triton(
    pair_act: Tensor,
    act: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    by_pair: LoraSegments,
    by_row: LoraSegments,
    *,
    out: Tensor,
    table: TuningTable | None = None,
    capability: int | None = None,
) -> None:
    """``moe_by_slot.add_pairs``: shrink over pairs, expand over rows. Raises ValueError."""
    routed = _device_segments(by_row)
    if not isinstance(by_pair, DeviceSegments):
        raise ValueError("pairs are grouped on the device")
    choice = two_launches(act, target, tables, routed, table, capability)
    planes = torch.empty(choice.planes_shape, dtype=torch.float32, device=act.device)
    lora_shrink(pair_act, storage, target, tables, by_pair, choice.shrink, planes=planes)
    lora_expand(planes, act, storage, target, tables, routed, choice.expand, out=out)


def sum_pairs_triton(of_pairs: Tensor, segments: LoraSegments, *, out: Tensor) -> None:
    """``moe_by_slot.sum_pairs``; allocates nothing. Raises ValueError before the launch."""
    routed = _device_segments(segments)
    n_rows, n_choices = routed.pair_of.shape
    width = out.shape[1]
    if out.shape[0] != n_rows or tuple(of_pairs.shape) != (n_rows * n_choices, width):
        raise ValueError(f"pairs are {tuple(of_pairs.shape)}, out is {tuple(out.shape)}")
    if of_pairs.dtype != out.dtype or routed.weights is None:
        raise ValueError("pairs must have weights, and their products the dtype of out")
    if n_rows == 0:
        return
    if of_pairs.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous along the width")
    block = min(_BLOCK, triton.next_power_of_2(width))
    sum_kernel[(n_rows, triton.cdiv(width, block))](
        of_pairs, routed.pair_of, routed.weights, out, of_pairs.stride(0), out.stride(0),
        F=width, BLOCK=block, CHOICES=n_choices, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def segments_of_pairs(by_row: LoraSegments, pair_ids: Tensor) -> DeviceSegments:
    """The same pairs as rows of their own; ``pair_ids`` int32 counts from 0. Launches nothing."""
    n_pairs = by_row.indices.shape[0]
    if pair_ids.shape[0] < n_pairs or pair_ids.dtype != torch.int32:
        raise ValueError(f"pair_ids must be int32 of {n_pairs} at least")
    own = pair_ids[:n_pairs]
    return replace(_device_segments(by_row), indices=own, n_rows=n_pairs, blocks=None, weights=None)


def _device_segments(segments: LoraSegments) -> DeviceSegments:
    if not isinstance(segments, DeviceSegments) or segments.blocks is None:
        raise ValueError("pairs are grouped on the device, several a row")
    return segments
