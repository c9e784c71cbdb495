"""The gates of a step's rows in one launch, each row by the gate of its adapter.

    s[e] = Σ_k gate[e, k] · x[row, k]      float32, columns in blocks, ascending

Shapes: x [n_rows, K], row_slots [n_rows], slots and weights [n_rows, CHOICES]. One program routes
one row. It reads the row's own gate, TILE experts at a time, and keeps experts by the rule of
``gate_table``. Comparing all experts with all others orders them, so their places are a permutation
even where products are not numbers (NaN counts as the largest, as in ``torch.sort``). Unused places
are filled with -1, so a CUDA graph may replay the launch over any rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.gate_table import GATE_WORDS, MAX_CHOICES, MAX_EXPERTS, GateTable

from .arithmetic import aligned

_BLOCK_K = 512
_TILE = 16  # experts; gates rarely have more
_GATE_ALIGN = 16  # float32 elements: the pool's 64 bytes
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def route_kernel(
    x_ptr,
    row_slots_ptr,
    gates_ptr,
    words_ptr,
    load_ptr,
    slots_ptr,
    weights_ptr,
    stride_xm,
    stride_ws,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    CHOICES: tl.constexpr,
    GATE_ALIGN: tl.constexpr,
):
    row = tl.program_id(0)
    choices = tl.arange(0, CHOICES)
    slots_ptr += row * CHOICES
    weights_ptr += row * CHOICES
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    words_ptr += slot * stride_ws
    offset = tl.load(words_ptr, mask=slot >= 0, other=-1)
    if offset < 0:
        is_plain = (choices == 0) & (slot >= 0)
        tl.store(slots_ptr + choices, tl.where(is_plain, slot.to(tl.int32), -1))
        tl.store(weights_ptr + choices, tl.where(is_plain, 1.0, 0.0))
        return
    n_experts = tl.load(words_ptr + 1).to(tl.int32)
    first = tl.load(words_ptr + 2).to(tl.int32)
    n_kept = tl.load(words_ptr + 3).to(tl.int32)
    experts = tl.arange(0, EXPERTS)
    is_known = experts < n_experts
    columns = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64) * stride_xm + columns
    tile = tl.arange(0, TILE)
    tiles = tl.arange(0, EXPERTS // TILE)
    by_tile = tl.zeros((EXPERTS // TILE, TILE), dtype=tl.float32)
    for index in range(tl.cdiv(n_experts, TILE)):
        own = index * TILE + tile
        gate_ptrs = gates_ptr + aligned(offset, GATE_ALIGN) + own[:, None] * K + columns[None, :]
        total = tl.zeros((TILE, BLOCK_K), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            inside = start + columns < K
            x = tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
            mask = (own < n_experts)[:, None] & inside[None, :]
            total += tl.load(gate_ptrs + start, mask=mask, other=0.0) * x[None, :]
        by_tile = tl.where(tiles[:, None] == index, tl.sum(total, axis=1)[None, :], by_tile)
    scores = tl.reshape(by_tile, (EXPERTS,))
    keys = tl.where(scores == scores, scores, float("inf"))
    keys = tl.where(is_known, keys, float("-inf"))
    other = tl.reshape(keys, (1, EXPERTS))
    own = tl.reshape(keys, (EXPERTS, 1))
    is_ahead = (other > own) | ((other == own) & (experts[None, :] < experts[:, None]))
    place = tl.sum(is_ahead.to(tl.int32), axis=1)
    is_kept = is_known & (place < n_kept) & (place < CHOICES)
    e = tl.where(is_kept, tl.exp(scores - tl.max(keys)), 0.0)
    tl.store(slots_ptr + place, first + experts, mask=is_kept)
    tl.store(weights_ptr + place, e / tl.sum(e), mask=is_kept)
    is_spare = choices >= tl.sum(is_kept.to(tl.int32))
    tl.store(slots_ptr + choices, -1, mask=is_spare)
    tl.store(weights_ptr + choices, 0.0, mask=is_spare)
    one = tl.full((EXPERTS,), 1, tl.int64)
    tl.atomic_add(load_ptr + first + experts, one, mask=is_kept, sem="relaxed")


def route_by_slot_triton(
    x: Tensor,
    row_slots: Tensor,
    storage: Tensor,
    table: GateTable,
    *,
    slots: Tensor,
    weights: Tensor,
) -> None:
    """``route_by_slot`` into ``slots`` int32 and ``weights`` float32 [n_rows, MAX_CHOICES].

    Allocates nothing. Raises ValueError before the launch when a shape, stride, dtype or device
    does not fit.
    """
    _check(x, row_slots, storage, table, slots, weights)
    n_rows, width = x.shape
    if n_rows == 0:
        return
    route_kernel[(n_rows,)](
        x, row_slots, storage.view(torch.float32), table.words, table.load, slots, weights,
        x.stride(0), table.words.stride(0),
        K=width, BLOCK_K=min(_BLOCK_K, triton.next_power_of_2(width)), EXPERTS=MAX_EXPERTS,
        TILE=_TILE, CHOICES=MAX_CHOICES, GATE_ALIGN=_GATE_ALIGN,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def _check(
    x: Tensor,
    row_slots: Tensor,
    storage: Tensor,
    table: GateTable,
    slots: Tensor,
    weights: Tensor,
) -> None:
    if x.dim() != 2 or x.dtype not in _DTYPES or (x.shape[0] > 0 and x.stride(1) != 1):
        raise ValueError(f"x must be rows of floats, is {x.dtype} {tuple(x.shape)} {x.stride()}")
    n_rows = x.shape[0]
    if row_slots.shape != (n_rows,) or row_slots.dtype != torch.int32:
        raise ValueError(f"row_slots must be int32 [{n_rows}], is {tuple(row_slots.shape)}")
    shape = (n_rows, MAX_CHOICES)
    for name, tensor, dtype in (("slots", slots, torch.int32), ("weights", weights, torch.float32)):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} {shape}")
    n_slots = table.load.shape[0]
    if table.words.shape != (n_slots, GATE_WORDS) or table.words.stride(1) != 1:
        raise ValueError(f"words must be [{n_slots}, {GATE_WORDS}] with contiguous rows")
    if table.words.dtype != torch.int64 or table.load.dtype != torch.int64:
        raise ValueError("words and load must be int64")
    tensors = (row_slots, storage, table.words, table.load, slots, weights)
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"x is on {x.device}; storage, tables and outputs must be there too")
