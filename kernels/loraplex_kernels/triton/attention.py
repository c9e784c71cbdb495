"""Causal attention over the paged cache, decode and prefill rows mixed, split over the positions.

    out[i, h] = Σ_j softmax_j(scale · q[i, h] · k[j]) v[j]      j ≤ place(i), j > place(i) − window

Shapes: q, out [T, n_heads, D]. A tile holds BLOCK_Q queries of one request times the heads that
share a key head. Positions are cut into splits of SPLIT_POSITIONS, counted from position 0. Split s
belongs to group s mod N_GROUPS. A group has one online softmax over its splits in ascending order,
and groups are merged in ascending order. So the grid has at most N_GROUPS programs a tile for any
context. Requests with few queries and more than one split are *divided*: each group has a program,
and ``combine_kernel`` merges their float32 partials. For other requests one program computes all
groups. A hidden position adds an exact zero, so a row has the same bits in every batch, divided or
not. There are no atomics and no host syncs, and programs without work exit at once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import e4m3_values
from .kv_cache import check_cache, code_view

SPLIT_POSITIONS = 512
N_GROUPS = 16  # × 8 key heads: one request alone has a program for each multiprocessor
_FEW_ROWS = 256  # up to this many rows every request is divided, and tiles are small
_FEW_QUERIES = 8  # in larger steps only requests of up to this many queries are divided
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_request(starts_ptr, n_requests, tile, BLOCK_Q: tl.constexpr):
    """Return the last request r with starts[r] // BLOCK_Q + r ≤ tile: tiles need no table."""
    count = 0
    for first in range(0, n_requests, 128):
        r = first + tl.arange(0, 128)
        start = tl.load(starts_ptr + r, mask=r < n_requests, other=0)
        hit = (start // BLOCK_Q + r <= tile) & (r < n_requests)
        count += tl.sum(hit.to(tl.int32))
    return count - 1


@triton.jit
def merge(m, norm, acc, other_m, other_norm, other_acc):
    """Merge two online-softmax states. An empty state (m = -inf) does not change the other."""
    top = tl.maximum(m, other_m)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2(m - safe)
    b = tl.exp2(other_m - safe)
    return top, norm * a + other_norm * b, acc * a[:, None] + other_acc * b[:, None]


@triton.jit
def cached(codes, dtype: tl.constexpr):
    """Return keys or values in ``dtype``. All e4m3 values are exact in 16 bits."""
    return e4m3_values(codes).to(dtype) if codes.dtype == tl.uint8 else codes


@triton.jit
def attend_split(
    m, norm, acc, ones, q, k_cache_ptr, v_cache_ptr, pages_ptr, kv_head, first, last, place, stop,
    scale, window, softcap,
    N_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Continue an online softmax over positions [first, last): maximum (base 2), norm, sum."""
    dims = tl.arange(0, BLOCK_D)
    inside = dims < D
    for start in range(first, last, BLOCK_KV):
        j = start + tl.arange(0, BLOCK_KV)
        # Memory beyond the last position was never written and is not read.
        exists = j < stop
        page = tl.load(pages_ptr + j // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        at = (page * N_KV + kv_head) * (PAGE_SIZE * D) + j % PAGE_SIZE * D
        k = tl.load(
            k_cache_ptr + at[None, :] + dims[:, None],
            mask=exists[None, :] & inside[:, None],
            other=0,
        )
        scores = tl.dot(q, cached(k, q.dtype), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # c · tanh(s / c) by exp2, so that it is the same function everywhere
            grown = tl.exp2(scores * (2.0 * _LOG2_E / softcap))
            scores = softcap * (1.0 - 2.0 / (grown + 1.0))
        seen = j[None, :] <= place[:, None]
        if HAS_WINDOW:
            seen = seen & (j[None, :] > place[:, None] - window)
        scores = tl.where(seen, scores * _LOG2_E, float("-inf"))
        top = tl.maximum(m, tl.max(scores, axis=1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(m - safe)
        v = tl.load(
            v_cache_ptr + at[:, None] + dims[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0,
        )
        v = cached(v, q.dtype)
        p = p.to(v.dtype)
        norm = tl.dot(p, ones, norm * fade[:, None], input_precision="ieee")
        acc = tl.dot(p, v, acc * fade[:, None], input_precision="ieee")
        m = top
    return m, norm, acc


@triton.jit
def attend_group(
    group, ones, q, k_cache_ptr, v_cache_ptr, pages_ptr, kv_head, begin, place, stop, scale,
    window, softcap,
    N_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
    N_GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Compute an online softmax over the splits of a group within positions [begin, stop)."""
    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    norm = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    split = first_split(begin, group, SPLIT, N_GROUPS)
    for position in range(split * SPLIT, stop, SPLIT * N_GROUPS):
        m, norm, acc = attend_split(
            m, norm, acc, ones, q, k_cache_ptr, v_cache_ptr, pages_ptr, kv_head,
            tl.maximum(position, begin // BLOCK_KV * BLOCK_KV),
            tl.minimum(position + SPLIT, stop), place, stop, scale, window, softcap,
            N_KV, D, BLOCK_D, PAGE_SIZE, BLOCK_KV, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
    return m, tl.max(norm, axis=1), acc


@triton.jit
def is_divided(kv_len, n_queries, most_queries, SPLIT: tl.constexpr):
    """Return True if several programs compute the groups of a request."""
    return (kv_len > SPLIT) & (n_queries <= most_queries)


@triton.jit
def first_split(begin, group, SPLIT: tl.constexpr, N_GROUPS: tl.constexpr):
    """Return the first split of a group with positions from ``begin`` on."""
    split = begin // SPLIT
    return split + (group + N_GROUPS - split % N_GROUPS) % N_GROUPS


@triton.jit(
    do_not_specialize=[
        "stride_pages", "n_requests", "n_places", "most_queries", "per_request", "window"
    ]
)  # fmt: skip
def attend_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, page_table_ptr, starts_ptr, kv_lens_ptr, out_ptr,
    partial_ptr, norm_ptr,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_pages,
    n_requests, n_places, most_queries, per_request, scale, window, softcap,
    N_KV: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, N_GROUPS: tl.constexpr, ONE_GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """ONE_GROUP: undivided requests have no second split."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_PADDED
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_group = tl.program_id(2)
    request = find_request(starts_ptr, n_requests, tile, BLOCK_Q)
    start = tl.load(starts_ptr + request)
    n_queries = tl.load(starts_ptr + request + 1) - start
    first_query = (tile - start // BLOCK_Q - request) * BLOCK_Q
    if first_query >= n_queries:
        return
    kv_len = tl.load(kv_lens_ptr + request)
    divided = is_divided(kv_len, n_queries, most_queries, SPLIT)
    end_group = first_group + 1
    if not divided:
        if first_group > 0:
            return
        end_group = N_GROUPS
    hidden = kv_len - n_queries  # place of query 0
    stop = hidden + tl.minimum(first_query + BLOCK_Q, n_queries)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(hidden + first_query - window + 1, 0)
    lanes = tl.arange(0, BLOCK_M)
    query = first_query + lanes // GROUP_PADDED
    in_tile = (query < n_queries) & (lanes % GROUP_PADDED < GROUP)
    head = kv_head * GROUP + lanes % GROUP_PADDED
    row = (start + query).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = in_tile[:, None] & (dims < D)[None, :]
    q = tl.load(
        q_ptr + (row * stride_qt + head * stride_qh)[:, None] + dims[None, :], mask=mask, other=0.0
    )
    place = tl.where(in_tile, hidden + query, -1)
    pages_ptr = page_table_ptr + request.to(tl.int64) * stride_pages
    # The norm is a product with ones: a reduction's order would follow the thread layout.
    ones = tl.full((BLOCK_KV, 16), 1.0, dtype=tl.float32).to(q.dtype)  # Triton 3.6 needs this form
    m, norm, acc = attend_group(
        first_group, ones, q, k_cache_ptr, v_cache_ptr, pages_ptr, kv_head, begin, place, stop,
        scale, window, softcap,
        N_KV, D, BLOCK_D, PAGE_SIZE, BLOCK_KV, BLOCK_M, SPLIT, N_GROUPS, HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip
    if not ONE_GROUP:
        for group in range(first_group + 1, end_group):
            other_m, other_norm, other_acc = attend_group(
                group, ones, q, k_cache_ptr, v_cache_ptr, pages_ptr, kv_head, begin, place, stop,
                scale, window, softcap,
                N_KV, D, BLOCK_D, PAGE_SIZE, BLOCK_KV, BLOCK_M, SPLIT, N_GROUPS,
                HAS_WINDOW, HAS_SOFTCAP,
            )  # fmt: skip
            m, norm, acc = merge(m, norm, acc, other_m, other_norm, other_acc)
    if divided:
        # A group that is empty here is empty for every row of the tile and is not read.
        slot = tl.where(per_request > 0, request * per_request + query, start + query)
        at = (first_group.to(tl.int64) * n_places + slot) * (N_KV * GROUP) + head
        tl.store(norm_ptr + at * 2, m, mask=in_tile)
        tl.store(norm_ptr + at * 2 + 1, norm, mask=in_tile)
        tl.store(partial_ptr + at[:, None] * D + dims[None, :], acc, mask=mask)
    else:
        y = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]  # lanes beyond the tile have none
        pointers = out_ptr + (row * stride_ot + head * stride_oh)[:, None] + dims[None, :]
        tl.store(pointers, y, mask=mask)


@triton.jit(do_not_specialize=["n_requests", "n_places", "most_queries", "per_request", "window"])
def combine_kernel(
    partial_ptr, norm_ptr, starts_ptr, kv_lens_ptr, out_ptr, stride_ot, stride_oh,
    n_requests, n_places, most_queries, per_request, window,
    N_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
    N_GROUPS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if per_request > 0:
        request = slot // per_request
        row = tl.load(starts_ptr + request) + slot % per_request
    else:
        row = slot
        count = 0
        for base in range(0, n_requests, 128):
            r = base + tl.arange(0, 128)
            from_row = tl.load(starts_ptr + r, mask=r < n_requests, other=0)
            count += tl.sum(((from_row <= row) & (r < n_requests)).to(tl.int32))
        request = count - 1
    end = tl.load(starts_ptr + request + 1)
    if row >= end:
        return
    kv_len = tl.load(kv_lens_ptr + request)
    if not is_divided(kv_len, end - tl.load(starts_ptr + request), most_queries, SPLIT):
        return
    place = kv_len - (end - row)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(place - window + 1, 0)
    dims = tl.arange(0, BLOCK_D)
    m = tl.full((1,), float("-inf"), dtype=tl.float32)
    norm = tl.zeros((1,), dtype=tl.float32)
    acc = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    one = tl.arange(0, 1)
    for group in range(N_GROUPS):
        if first_split(begin, group, SPLIT, N_GROUPS) * SPLIT <= place:
            at = (slot.to(tl.int64) + group * n_places) * N_HEADS + head
            other_m = tl.load(norm_ptr + at * 2 + one)
            other_norm = tl.load(norm_ptr + at * 2 + 1 + one)
            pointers = partial_ptr + at * D + one[:, None] + dims[None, :]
            other_acc = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
            m, norm, acc = merge(m, norm, acc, other_m, other_norm, other_acc)
    pointers = out_ptr + row.to(tl.int64) * stride_ot + head * stride_oh + dims[None, :]
    tl.store(pointers + one[:, None], acc / norm[:, None], mask=(dims < D)[None, :])


class AttentionWorkspace(NamedTuple):
    """The float32 partials of divided requests."""

    partials: Tensor  # [n_groups * n_places * n_heads * D]
    norms: Tensor  # [n_groups * n_places * n_heads * 2]: maximum, norm


class Division(NamedTuple):
    """The distribution of a step over programs, which depends on its shapes alone."""

    n_groups: int  # programs of a tile
    most_queries: int  # a divided request has at most this many
    per_request: int  # places of a request in the workspace; 0 = one place for each row
    n_places: int

    @staticmethod
    def of(n_rows: int, n_requests: int, n_positions: int) -> Division:
        n_groups = min(N_GROUPS, -(-n_positions // SPLIT_POSITIONS))
        if n_groups == 1:
            return Division(1, 0, 0, 0)
        if n_rows <= _FEW_ROWS:
            return Division(n_groups, n_rows, 0, n_rows)
        if n_requests * _FEW_QUERIES < n_rows:
            return Division(n_groups, _FEW_QUERIES, _FEW_QUERIES, n_requests * _FEW_QUERIES)
        return Division(n_groups, _FEW_QUERIES, 0, n_rows)


def attention_workspace(
    division: Division, n_heads: int, head_dim: int, device: torch.device
) -> AttentionWorkspace:
    n = division.n_groups * division.n_places * n_heads
    sizes = (max(1, n * head_dim), max(1, n * 2))
    return AttentionWorkspace(*(torch.empty(size, device=device) for size in sizes))


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = True,
    capability: int | None = None,  # None: of the device
) -> Tensor:
    """``paged_attention_reference`` on a GPU. Writes and returns ``out``.

    Launches depend on shapes only (``page_table`` [n_requests, n_pages] bounds the positions), so a
    CUDA graph may replay them. ``query_starts`` and ``kv_lens`` are int32 on the device. Requests
    without queries and rows beyond the last request are not changed. ``out`` is allocated when
    absent. ``batch_invariant``: a row has the same bits in every batch. Otherwise large steps use
    larger tiles, whose matrix instruction may sum in another order (wgmma on Hopper). Raises
    ValueError before the launch when a shape does not fit.
    """
    _check(q, k_cache, v_cache, page_table, query_starts, kv_lens)
    out = torch.empty_like(q) if out is None else out
    n_rows, n_heads, head_dim = q.shape
    if out.shape != q.shape or (n_rows and out.stride(2) != 1):
        raise ValueError(f"out must be {tuple(q.shape)}, contiguous along D")
    n_requests = kv_lens.shape[0]
    if n_rows == 0 or n_requests == 0:
        return out
    n_kv, page_size = k_cache.shape[1], k_cache.shape[2]
    n_positions = page_table.shape[1] * page_size
    division = Division.of(n_rows, n_requests, n_positions)
    space = attention_workspace(division, n_heads, head_dim, q.device)
    group = n_heads // n_kv
    padded = triton.next_power_of_2(group)
    is_plain = window is None and softcap is None  # masks do not fit into the registers
    takes_widest = is_plain and not batch_invariant
    widest = _widest_tile(capability or _capability_of(q.device)) if takes_widest else 32
    is_small = q.element_size() != 2 or head_dim > 128 or n_rows <= _FEW_ROWS
    block_m = max(16 if is_small else widest, padded)
    # ``find_request`` leaves a free tile between requests: the last may be beyond ``n_rows``.
    n_tiles = n_rows // (block_m // padded) + n_requests
    block_d = triton.next_power_of_2(head_dim)
    shared = {
        "D": head_dim, "BLOCK_D": block_d, "SPLIT": SPLIT_POSITIONS, "N_GROUPS": N_GROUPS,
        "HAS_WINDOW": window is not None,
    }  # fmt: skip
    attend_kernel[(n_tiles, n_kv, division.n_groups)](
        q, code_view(k_cache), code_view(v_cache), page_table, query_starts, kv_lens, out, *space,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), page_table.stride(0),
        n_requests, division.n_places, division.most_queries, division.per_request,
        scale, window or 0, softcap or 1.0,
        N_KV=n_kv, GROUP=group, GROUP_PADDED=padded, PAGE_SIZE=page_size,
        BLOCK_KV=_block_positions(block_d, q.element_size()), BLOCK_M=block_m,
        ONE_GROUP=n_rows <= _FEW_ROWS, HAS_SOFTCAP=softcap is not None,
        enable_fp_fusion=False, **_resources(block_m, q, k_cache), **shared,
    )  # fmt: skip
    if division.n_groups > 1:
        combine_kernel[(division.n_places, n_heads)](
            *space, query_starts, kv_lens, out, out.stride(0), out.stride(1),
            n_requests, division.n_places, division.most_queries, division.per_request,
            window or 0, N_HEADS=n_heads, num_warps=1, enable_fp_fusion=False, **shared,
        )  # fmt: skip
    return out


@cache
def _capability_of(device: torch.device) -> int:
    """The compute capability as 80, 90, …; 80 for a CPU tensor in Triton's interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _widest_tile(capability: int) -> int:
    """Return the most rows of a tile. 64 rows use wgmma or tcgen05."""
    return 64 if capability // 10 in (9, 10) else 32


def _resources(block_m: int, q: Tensor, k_cache: Tensor) -> dict[str, int]:
    """Warps, stages and registers at which no program spills (``make kernels-report``)."""
    if k_cache.element_size() == 1:
        return {"num_warps": 4 if block_m == 16 else 8, "num_stages": 2, "maxnreg": 255}
    if q.element_size() != 2:
        return {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    is_small = block_m == 16 and q.shape[2] <= 128
    n_stages = 3 if block_m == 64 else 2
    return {"num_warps": 4, "num_stages": n_stages, "maxnreg": 168 if is_small else 255}


def max_head_dim(dtype: torch.dtype) -> int:
    """Return the largest head that fits the registers of a program without spilling."""
    return 256 if dtype.itemsize == 2 else 128


def _block_positions(block_d: int, element_size: int) -> int:
    """Return the positions of one product, by shared memory and registers, never by the batch."""
    if element_size == 4:
        return 16
    return 64 if block_d <= 128 else 32


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
) -> None:
    check_cache(k_cache, v_cache)
    n_kv, head_dim = k_cache.shape[1], k_cache.shape[3]
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % n_kv:
        raise ValueError(f"q is {tuple(q.shape)}, the cache holds {n_kv} heads of {head_dim}")
    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn) or q.device != k_cache.device:
        raise ValueError(f"q is {q.dtype} on {q.device}, the cache {k_cache.dtype}")
    if q.shape[0] and q.stride(2) != 1:
        raise ValueError("q must be contiguous along D")
    if head_dim > max_head_dim(q.dtype):
        raise ValueError(f"head size {head_dim} in {q.dtype}; up to {max_head_dim(q.dtype)}")
    n_requests = kv_lens.shape[0]
    if query_starts.shape != (n_requests + 1,) or page_table.shape[0] < n_requests:
        raise ValueError(f"{n_requests} requests need {n_requests + 1} starts and a page row each")
    if page_table.stride(1) != 1 and page_table.shape[1] > 1:
        raise ValueError("page_table must be contiguous along its pages")
