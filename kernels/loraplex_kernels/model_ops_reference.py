"""The base model's operators in PyTorch: what each native kernel equals; any dtype and device.

Sums run in float32, or in float64 for float64 tensors. T is the number of rows (tokens) of a step.

Layout of the paged KV cache. ``k_cache`` and ``v_cache`` are [n_pages, n_kv_heads, page_size, D];
slot ``s`` is position ``s % page_size`` of page ``s // page_size``. On a GPU that is all: a row of
D elements each. On a CPU the block of one (page, head) is laid out for dot products, with ``u`` = 2
for two-byte dtypes and 1 for wider ones:

    K: [D / u, page_size, u]      V: [page_size / u, D, u]

so only the functions here read or write inside a page; whole pages may be copied freely.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "add_rms_norm_reference",
    "paged_attention_reference",
    "read_kv",
    "rms_norm_reference",
    "rope_and_cache_reference",
    "silu_mul_reference",
    "write_kv_reference",
]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``x / rms(x) * (offset + weight)`` over the last dimension.

    Rounds where transformers does: without an offset (Llama) before the product with the weight,
    with one (Gemma) after it.
    """
    compute = _compute_dtype(x)
    wide = x.to(compute)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return weight * normed.to(x.dtype)
    return (normed * (offset + weight.to(compute))).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """``residual += x`` in place; returns the norm of the sum."""
    residual += x
    return rms_norm_reference(residual, weight, eps, offset=offset)


def silu_mul_reference(gate_up: Tensor, *, act: str = "silu") -> Tensor:
    """``act(gate) * up`` of ``gate_up`` [T, 2F]; ``act`` is ``silu`` or ``gelu_tanh``."""
    gate, up = gate_up.chunk(2, dim=-1)
    if act == "silu":
        return functional.silu(gate) * up
    if act == "gelu_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    raise ValueError(f"unknown activation {act!r}; known: silu, gelu_tanh")


def rope_and_cache_reference(
    q_k_v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
) -> None:
    """Rotates q and k of ``q_k_v`` [T, (n_heads + 2 n_kv_heads) D] in place; caches k, v.

    ``cos``, ``sin`` [n_positions, rotary_dim] (the two halves repeated, as transformers makes them;
    None = no rotary) turn the first ``rotary_dim`` of each head, in float32 with one rounding.
    """
    heads = q_k_v.view(q_k_v.shape[0], n_heads + 2 * n_kv_heads, head_dim)
    n_rotated = n_heads + n_kv_heads
    if cos is not None and sin is not None:
        compute = _compute_dtype(q_k_v)
        rotated = heads[:, :n_rotated, : cos.shape[1]]
        wide = rotated.to(compute)
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        c = cos[positions].to(compute).unsqueeze(1)
        s = sin[positions].to(compute).unsqueeze(1)
        rotated.copy_(wide * c + turned * s)
    write_kv_reference(
        heads[:, n_heads:n_rotated], heads[:, n_rotated:], k_cache, v_cache, slot_mapping
    )


def write_kv_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Writes ``k``, ``v`` [T, n_kv_heads, D] to slots ``slot_mapping`` [T]; negative = skip."""
    kept = slot_mapping >= 0
    slot_mapping, k, v = slot_mapping[kept], k[kept], v[kept]
    page_size, head_dim = k_cache.shape[2:]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    k_pages, v_pages = _inner_views(k_cache, v_cache)
    k_unit, v_unit = k_pages.shape[-1], v_pages.shape[-1]
    k_pages[pages, :, :, offsets] = k.reshape(*k.shape[:2], head_dim // k_unit, k_unit)
    v_pages[pages, :, offsets // v_unit, :, offsets % v_unit] = v


def read_kv(k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values at ``slot_mapping`` [T], each [T, n_kv_heads, D]."""
    page_size, head_dim = k_cache.shape[2:]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    k_pages, v_pages = _inner_views(k_cache, v_cache)
    unit = v_pages.shape[-1]
    k = k_pages[pages, :, :, offsets].reshape(len(slot_mapping), k_cache.shape[1], head_dim)
    return k, v_pages[pages, :, offsets // unit, :, offsets % unit]


def paged_attention_reference(
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
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of ``q`` [T, n_heads, D] over paged keys; decode and prefill rows mixed.

    Rows ``query_starts[r] : query_starts[r + 1]`` belong to request ``r``, whose cache holds
    ``kv_lens[r]`` positions in the pages ``page_table[r]``; its queries are the last of them. Query
    ``i`` of ``n`` sees positions ≤ ``kv_lens[r] - n + i``, with ``window`` only the last ``window``
    of those. ``softcap`` is Gemma's ``c · tanh(score / c)``. ``sinks`` [n_heads] are scores that
    take their share of each head's softmax and give nothing (gpt-oss). Writes and returns ``out``.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    page_size = k_cache.shape[2]
    starts, lens = query_starts.tolist(), kv_lens.tolist()
    for r, kv_len in enumerate(lens):
        rows = slice(starts[r], starts[r + 1])
        if starts[r] == starts[r + 1]:
            continue
        place = torch.arange(kv_len, device=q.device)
        slots = page_table[r].long()[place // page_size] * page_size + place % page_size
        k, v = read_kv(k_cache, v_cache, slots)
        out[rows] = _attend(q[rows], k, v, scale, window, softcap, sinks)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    compute = _compute_dtype(q)
    n_queries, n_heads = q.shape[:2]
    group = n_heads // k.shape[1]
    keys = k.to(compute).repeat_interleave(group, dim=1)
    values = v.to(compute).repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.to(compute), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    last = torch.arange(len(k) - n_queries, len(k), device=q.device)[:, None]
    place = torch.arange(len(k), device=q.device)[None, :]
    hidden = place > last
    if window is not None:
        hidden |= place <= last - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(compute)[:, None, None].expand(n_heads, n_queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hij,jhd->ihd", probabilities, values).to(q.dtype)


def _inner_views(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n_pages, n_kv_heads, D / u, page_size, u], values [.., page_size / u, D, u]."""
    n_pages, n_kv_heads, page_size, head_dim = k_cache.shape
    k_unit = v_unit = 2 if k_cache.element_size() == 2 else 1
    if k_cache.is_cuda:
        k_unit, v_unit = head_dim, 1
    return (
        k_cache.view(n_pages, n_kv_heads, head_dim // k_unit, page_size, k_unit),
        v_cache.view(n_pages, n_kv_heads, page_size // v_unit, head_dim, v_unit),
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
