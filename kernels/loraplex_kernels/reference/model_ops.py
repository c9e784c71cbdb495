"""The definition of the base model's operators in PyTorch, for any dtype and device.

``layers.model_ops`` documents the arguments. Sums run in float32, or in float64 for float64
tensors. T is the number of rows (tokens) of a step.

Layout of the paged KV cache: ``k_cache`` and ``v_cache`` are [n_pages, n_kv_heads, page_size, D].
Slot ``s`` is position ``s % page_size`` of page ``s // page_size``. On a GPU a position is a row of
D elements. On a CPU the block of one (page, head) is laid out for dot products, with ``u`` = 2 for
two-byte dtypes and 1 for wider dtypes:

    K: [D / u, page_size, u]      V: [page_size / u, D, u]

So only the operators read or write inside a page. Whole pages may be copied freely. A cache may be
in float8_e4m3fn beside wider queries: keys and values are rounded to nearest even, at most ±448. On
a CPU it may be in int8 (``formats.int8_cache``), with a scale for each token of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional

from loraplex_kernels.formats.int8_cache import codes_of, head_dim_of, to_codes


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``x / rms(x) * (offset + weight)`` over the last dimension.

    Rounds where transformers does: before the product with the weight without an offset (Llama),
    after the product with an offset (Gemma).
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
    """Add ``x`` to ``residual`` in place and return the norm of the sum."""
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
) -> None:
    """Rotate q and k of ``q_k_v`` in place and cache k and v.

    The first ``rotary_dim`` elements of each head turn, in float32 with one rounding.
    """
    n_kv_heads, head_dim = k_cache.shape[1], head_dim_of(k_cache)
    heads = q_k_v.view(q_k_v.shape[0], -1, head_dim)
    n_rotated = heads.shape[1] - n_kv_heads
    if cos is not None and sin is not None:
        compute = _compute_dtype(q_k_v)
        rotated = heads[:, :n_rotated, : cos.shape[1]]
        wide = rotated.to(compute)
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        c = cos[positions].to(compute).unsqueeze(1)
        s = sin[positions].to(compute).unsqueeze(1)
        rotated.copy_(wide * c + turned * s)
    keys, values = heads[:, n_rotated - n_kv_heads : n_rotated], heads[:, n_rotated:]
    write_kv_reference(keys, values, k_cache, v_cache, slot_mapping)


def write_kv_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write ``k``, ``v`` [T, n_kv_heads, D] to slots ``slot_mapping`` [T]; negative = skip."""
    is_written = slot_mapping >= 0
    slot_mapping, k, v = slot_mapping[is_written], k[is_written], v[is_written]
    page_size, head_dim = k_cache.shape[2], head_dim_of(k_cache)
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    if k_cache.dtype is torch.int8:
        keys, values = codes_of(k_cache, by_column=True), codes_of(v_cache, by_column=False)
        keys.codes[pages, :, :, offsets], keys.scales[pages, :, offsets] = to_codes(k)
        values.codes[pages, :, offsets], values.scales[pages, :, offsets] = to_codes(v)
        return
    k_pages, v_pages = _inner_views(k_cache, v_cache)
    k_unit, v_unit = k_pages.shape[-1], v_pages.shape[-1]
    if k_cache.dtype is torch.float8_e4m3fn:
        largest = torch.finfo(k_cache.dtype).max
        k, v = (x.clamp(-largest, largest).to(k_cache.dtype) for x in (k, v))
    k_pages[pages, :, :, offsets] = k.reshape(*k.shape[:2], head_dim // k_unit, k_unit)
    v_pages[pages, :, offsets // v_unit, :, offsets % v_unit] = v


def read_kv(k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values at ``slot_mapping`` [T], each [T, n_kv_heads, D].

    They have the dtype of the cache; those of an int8 cache are float32.
    """
    page_size, head_dim = k_cache.shape[2], head_dim_of(k_cache)
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    if k_cache.dtype is torch.int8:
        keys, values = codes_of(k_cache, by_column=True), codes_of(v_cache, by_column=False)
        return (
            keys.codes[pages, :, :, offsets] * keys.scales[pages, :, offsets, None].float(),
            values.codes[pages, :, offsets] * values.scales[pages, :, offsets, None].float(),
        )
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
    """Causal attention of ``q`` [T, n_heads, D] over paged keys, request by request."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    starts, lens = query_starts.tolist(), kv_lens.tolist()
    for r, kv_len in enumerate(lens):
        rows = slice(starts[r], starts[r + 1])
        if starts[r] == starts[r + 1]:
            continue
        n_queries = starts[r + 1] - starts[r]
        # Pages before the first query's window may belong to others by now.
        seen = 0 if window is None else max(0, kv_len - n_queries + 1 - window)
        k, v = _read_request(k_cache, v_cache, page_table[r], seen, kv_len)
        last = torch.arange(kv_len - n_queries, kv_len, device=q.device)[:, None]
        place = torch.arange(seen, kv_len, device=q.device)[None, :]
        hidden = place > last
        if window is not None:
            hidden |= place <= last - window
        out[rows] = _attend(q[rows], k, v, hidden, scale, softcap, sinks)
    return out


def block_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    first: int,
    end: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    seen_from: int | None = None,
) -> Tensor:
    """Attention within a block of one request, such as an image: a query sees later keys, too.

    ``q`` [n, n_heads, D] are the queries at positions ``first`` to ``first + n - 1``. Each sees all
    positions below ``end``, with ``window`` only those after its own position less ``window``, and
    those from ``seen_from`` on. ``pages`` [max_pages] are the request's. Returns [n, n_heads, D].
    """
    seen_from = end if seen_from is None else seen_from
    start = 0 if window is None else min(max(0, first - window + 1), seen_from)
    k, v = _read_request(k_cache, v_cache, pages, start, end)
    hidden = torch.zeros(len(q), end - start, dtype=torch.bool, device=q.device)
    if window is not None:
        own = torch.arange(first, first + len(q), device=q.device)[:, None]
        place = torch.arange(start, end, device=q.device)[None, :]
        hidden = (place <= own - window) & (place < seen_from)
    return _attend(q, k, v, hidden, scale, softcap, None)


def _read_request(
    k_cache: Tensor, v_cache: Tensor, pages: Tensor, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a request's positions ``start`` to ``end - 1``."""
    page_size = k_cache.shape[2]
    place = torch.arange(start, end, device=pages.device)
    slots = pages.long()[place // page_size] * page_size + place % page_size
    return read_kv(k_cache, v_cache, slots)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,  # bool [n_queries, n_keys]: the keys that a query does not see
    scale: float,
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
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(compute)[:, None, None].expand(n_heads, n_queries, 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("hij,jhd->ihd", probabilities, values).to(q.dtype)


def _inner_views(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys [n_pages, n_kv_heads, D / u, page_size, u], values [.., page_size / u, D, u]."""
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
