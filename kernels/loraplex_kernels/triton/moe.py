"""The experts of an MLP block over the pairs of a captured step (``lora.routed_mlp``).

    ``shrink_kernel``         h of every pair, from its row of x
    ``expand_gate_kernel``    pair_act = silu(g + Δg) · (u + Δu), g and u of the pair's row
    ``mix_kernel``            act[t] = Σ_j w_j pair_act[pair j of t]; without pairs: silu(g) · u
    shrink, expand            out[t] += Σ_j w_j Δ_j(pair_act[pair j of t])

Shapes: x [T, K], gate_up [T, 2F], pair_act [T · CHOICES, F] by position in the segments. Pairs
beyond the valid ones are neither read nor written. A row's sums follow the order of its choices and
a block's sums the order of segments, without atomics: a row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraSegments, LoraTables

from .checks import OFFSET_ALIGN, check_inputs
from .expand import add_pair, lora_expand, transform
from .launch_choices import ExpandChoice, expand_choice, tile_programs
from .shrink import lora_shrink
from .silu_mul import gated

_BLOCK = 1024


@triton.jit
def pair_product(
    planes_ptr, storage_ptr, ranks_ptr, b_pages_ptr, scale_ptr, bias_ptr, gate_up_ptr, stride_gt,
    slot, rows, pairs, row_mask, columns, n_pairs, max_pages,
    SLICE: tl.constexpr, F: tl.constexpr, N_PLANES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, OFFSET_ALIGN: tl.constexpr,
):  # fmt: skip
    """Return the base product of each pair's row plus its adapter's, in the rows' dtype."""
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


@triton.jit(do_not_specialize=["n_pairs", "max_pages", "n_tiles"])
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
    n_tiles,
    F: tl.constexpr,
    N_PLANES: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_M)
    skipped = tl.program_id(0) % (TILE_M // BLOCK_M) * BLOCK_M
    tile = tl.program_id(0) // (TILE_M // BLOCK_M)
    slot = tl.load(tiles_ptr + tile * 3)
    while slot >= 0:
        count = tl.load(tiles_ptr + tile * 3 + 2) - skipped
        if count > 0:
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
        tile += tl.num_programs(0) // (TILE_M // BLOCK_M)
        slot = tl.load(tiles_ptr + tile * 3, mask=tile < n_tiles, other=-1)


@triton.jit
def mix_kernel(
    gate_up_ptr, pair_act_ptr, pair_of_ptr, weights_ptr, out_ptr, stride_gt, stride_pt, stride_ot,
    F: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
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
    pointers = pair_act_ptr + first.to(tl.int64) * stride_pt + columns
    values = tl.load(pointers, mask=inside, other=0.0)
    total = values.to(tl.float32) * tl.load(weights_ptr + first)
    for j in range(1, CHOICES):
        pair = tl.load(pair_of_ptr + row * CHOICES + j)
        if pair >= 0:
            pointers = pair_act_ptr + pair.to(tl.int64) * stride_pt + columns
            other = tl.load(pointers, mask=inside, other=0.0)
            total += other.to(tl.float32) * tl.load(weights_ptr + pair)
    tl.store(out_ptrs, total.to(values.dtype), mask=inside)


def gate_pairs_triton(
    x: Tensor,
    gate_up: Tensor,
    tables: LoraTables,
    segments: LoraSegments,
) -> Tensor:
    """Compute ``gate_pairs`` in two launches: a shrink, and an expand that ends in the activation.

    ``segments`` must be ``DeviceSegments`` over the rows of ``x``. Raises ValueError before the
    launches.
    """
    grouped = _device_segments(segments)
    planes = lora_shrink(x, tables, grouped)
    shape = (grouped.indices.shape[0], tables.target.out_features[0])
    out = torch.empty(shape, dtype=gate_up.dtype, device=x.device)
    expand_gate(planes, x, gate_up, tables, grouped, out=out)
    return out


def expand_gate(
    planes: Tensor,
    x: Tensor,
    gate_up: Tensor,
    tables: LoraTables,
    segments: DeviceSegments,
    *,
    out: Tensor,
    choice: ExpandChoice | None = None,
) -> None:
    """Fill ``out`` [n_pairs, F] from the ``planes`` of ``lora_shrink``. Allocates nothing.

    ``choice`` follows the rule when absent. Raises ValueError before the launch when a shape,
    stride, dtype or device does not fit.
    """
    target = tables.target
    check_inputs(x, tables, segments)
    width, n_pairs = out.shape[1], segments.indices.shape[0]
    if target.out_features != (width, width):
        raise ValueError(f"{target.name} is not a gate and an up projection of {width} columns")
    if tuple(gate_up.shape) != (x.shape[0], 2 * width) or out.shape[0] != n_pairs:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, out {tuple(out.shape)}")
    if gate_up.dtype != x.dtype or out.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, gate_up {gate_up.dtype}, out {out.dtype}")
    if segments.tiles.shape[0] == 0:
        return
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous along the width")
    if choice is None:
        choice = expand_choice(n_pairs, x.element_size())
    block_m = min(choice.block_m, segments.block_m)
    block_n = min(choice.block_n, 64 if x.element_size() == 2 else 32)  # two products at once
    n_tiles = segments.tiles.shape[0]
    programs = tile_programs(n_tiles, n_pairs, segments.block_m)
    grid = (programs * (segments.block_m // block_m), triton.cdiv(width, block_n))
    expand_gate_kernel[grid](
        planes, tables.storage, tables.ranks, tables.b_pages, tables.scale, tables.bias,
        segments.tiles, segments.indices, gate_up, out, gate_up.stride(0), out.stride(0),
        n_pairs, tables.b_pages.shape[2], n_tiles,
        F=width, N_PLANES=planes.shape[0], TILE_M=segments.block_m, BLOCK_M=block_m,
        BLOCK_N=block_n, OFFSET_ALIGN=OFFSET_ALIGN, num_warps=choice.num_warps,
        num_stages=choice.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


def mix_pairs_triton(gate_up: Tensor, pair_act: Tensor, segments: LoraSegments) -> Tensor:
    """``mix_pairs``. Raises ValueError before the launch."""
    grouped = _device_segments(segments)
    n_rows, n_choices = grouped.pair_of.shape
    width = pair_act.shape[1]
    if tuple(gate_up.shape) != (n_rows, 2 * width) or pair_act.shape[0] != n_rows * n_choices:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, pairs {tuple(pair_act.shape)}")
    if gate_up.dtype != pair_act.dtype or grouped.weights is None:
        raise ValueError("pairs must have weights, and their activations the dtype of gate_up")
    out = torch.empty((n_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if n_rows == 0:
        return out
    if gate_up.stride(1) != 1 or pair_act.stride(1) != 1:
        raise ValueError("rows must be contiguous along the width")
    block = min(_BLOCK, triton.next_power_of_2(width))
    mix_kernel[(n_rows, triton.cdiv(width, block))](
        gate_up, pair_act, grouped.pair_of, grouped.weights, out,
        gate_up.stride(0), pair_act.stride(0), out.stride(0),
        F=width, BLOCK=block, CHOICES=n_choices, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def add_pairs_triton(
    pair_act: Tensor,
    act: Tensor,
    tables: LoraTables,
    segments: LoraSegments,
    *,
    out: Tensor,
) -> None:
    """``add_pairs``: a shrink over pairs, then an expand over rows. Raises ValueError."""
    grouped = _device_segments(segments)
    planes = lora_shrink(pair_act, tables, grouped, rows_are_pairs=True)
    lora_expand(planes, act, tables, grouped, out=out)


def _device_segments(segments: LoraSegments) -> DeviceSegments:
    if not isinstance(segments, DeviceSegments) or segments.blocks is None:
        raise ValueError("pairs must be grouped on the device, several pairs a row")
    return segments
