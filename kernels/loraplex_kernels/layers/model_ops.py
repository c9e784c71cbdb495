"""The operators of a base model's step, each in the fastest version for its tensors.

Float32 and bfloat16 tensors on a CPU go to native code. Float32, bfloat16 and float16 tensors on a
GPU go to Triton. All others go to the PyTorch reference (``reference.model_ops``, which also
defines the layout inside a page of the KV cache). Native results are deterministic and
batch-invariant: a row has the same bits alone and among others, in a decode step and in a prefill
chunk. Nothing is recorded for autograd. Indices (pages, KV slots, positions) are not checked.
"""

import torch
from torch import Tensor

from loraplex_kernels.cpu.model_ops import (
    dtype_code,
    is_plain,
    native_ops,
    takes_cache,
    takes_heads,
    takes_norm,
)
from loraplex_kernels.formats.int8_cache import head_dim_of
from loraplex_kernels.reference.model_ops import (
    add_rms_norm_reference,
    paged_attention_reference,
    rms_norm_reference,
    rope_and_cache_reference,
    silu_mul_reference,
    write_kv_reference,
)

from .flashinfer_attention import CapturedAttention, PlannedAttention

_ACTS = {"silu": 0, "gelu_tanh": 1}
_LIGHT = 1 << 19  # up to this many elements a call keeps Python's lock
_LIGHT_QUERIES = 64
_MAX_NORM_WIDTH = 32768  # of ``rms_norm_triton``
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``x / rms(x) * (offset + weight)``, rounded as in transformers (see the reference)."""
    if x.is_cuda and x.is_contiguous() and _triton_norms(x, weight):
        from loraplex_kernels.triton.rms_norm import rms_norm_triton

        out = torch.empty_like(x)
        width = x.shape[-1]
        rms_norm_triton(x.view(-1, width), weight, eps, out=out.view(-1, width), offset=offset)
        return out
    if not _has_native_norm(x, weight):
        return rms_norm_reference(x, weight, eps, offset=offset)
    return _native_norm(x, None, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the norm of the sum."""
    if x.is_cuda and x.shape == residual.shape and _triton_norms(x, weight):
        from loraplex_kernels.triton.rms_norm import rms_norm_triton

        if x.dim() == 2 and x.stride(1) == residual.stride(1) == 1 and residual.dtype == x.dtype:
            out = torch.empty_like(x)
            rms_norm_triton(x, weight, eps, out=out, offset=offset, residual=residual)
            return out
    is_fit = is_plain(residual, x.dtype) and residual.shape == x.shape
    if not is_fit or not _has_native_norm(x, weight):
        return add_rms_norm_reference(x, residual, weight, eps, offset=offset)
    return _native_norm(x, residual, weight, eps, offset)


def norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *, n_heads: int, n_kv_heads: int
) -> None:
    """Apply ``rms_norm`` to each head of q and of k in place (Qwen3).

    ``qkv`` [T, (n_heads + 2 n_kv_heads) · D], the weights [D].
    """
    head_dim = q_weight.shape[0]
    if qkv.is_cuda and qkv.stride(1) == 1 and _triton_norms(qkv[:, :head_dim], q_weight):
        from loraplex_kernels.triton.rms_norm import norm_heads_triton

        norm_heads_triton(qkv, q_weight, k_weight, eps, n_heads=n_heads, n_kv_heads=n_kv_heads)
        return
    n_q, n_k = n_heads * head_dim, n_kv_heads * head_dim
    for columns, weight in ((slice(0, n_q), q_weight), (slice(n_q, n_q + n_k), k_weight)):
        # contiguous: one head of several rows is a strided view, which native code rejects
        heads = qkv[:, columns].reshape(-1, head_dim).contiguous()
        qkv[:, columns] = rms_norm(heads, weight, eps).view(qkv.shape[0], -1)


def silu_mul(gate_up: Tensor, *, act: str = "silu") -> Tensor:
    """``act(gate) * up`` of ``gate_up`` [T, 2F]; ``act`` is ``silu`` or ``gelu_tanh``."""
    if (
        gate_up.is_cuda
        and gate_up.dtype in _TRITON_DTYPES
        and act in _ACTS
        and gate_up.dim() == 2
        and gate_up.stride(1) == 1
    ):
        from loraplex_kernels.triton.silu_mul import silu_mul_triton

        out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        silu_mul_triton(gate_up, out=out, act=act)
        return out
    code = dtype_code(gate_up.dtype)
    n_rows, width = gate_up.shape[0], gate_up.shape[-1] // 2
    if (
        code is None
        or act not in _ACTS
        or gate_up.dim() != 2
        or width % 16 != 0
        or not is_plain(gate_up, gate_up.dtype)
    ):
        return silu_mul_reference(gate_up, act=act)
    out = torch.empty((n_rows, width), dtype=gate_up.dtype)
    native_ops(keep_gil=n_rows * width < _LIGHT).gate(
        code, gate_up.data_ptr(), out.data_ptr(), n_rows, width, _ACTS[act]
    )
    return out


def rope_and_cache(
    q_k_v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Rotate q and k of ``q_k_v`` [T, (n_heads + 2 n_kv_heads) D] in place and cache k and v.

    n_kv_heads and D are those of the caches [n_pages, n_kv_heads, page_size, D], which on a CPU may
    be in int8 (``formats.int8_cache``).
    ``cos``, ``sin``: [n_positions, rotary_dim ≤ D] with repeated halves, in float32 (most exact) or
    in the dtype of ``q_k_v`` (as transformers rounds them); None = no rotary embedding.
    ``positions``, ``slot_mapping``: int64 [T]; a negative slot is not written.
    """
    if q_k_v.is_cuda and q_k_v.dtype in _TRITON_DTYPES:
        from loraplex_kernels.triton.kv_cache import rope_and_cache_triton

        rope_and_cache_triton(q_k_v, cos, sin, positions, k_cache, v_cache, slot_mapping)
        return
    dtype = q_k_v.dtype
    code = dtype_code(dtype)
    wide = cos is not None and cos.dtype is torch.float32
    table_dtype = torch.float32 if wide else dtype
    tables_fit = cos is None or (
        sin is not None and is_plain(cos, table_dtype) and is_plain(sin, table_dtype)
    )
    if (
        code is None
        or not tables_fit
        or not q_k_v.is_cpu
        or q_k_v.stride(1) != 1
        or not takes_cache(k_cache, v_cache, dtype)
        or not is_plain(positions, torch.int64)
        or not is_plain(slot_mapping, torch.int64)
    ):
        rope_and_cache_reference(q_k_v, cos, sin, positions, k_cache, v_cache, slot_mapping)
        return
    n_rows, stride = q_k_v.shape[0], q_k_v.stride(0)
    first = q_k_v.data_ptr()
    n_kv_heads, page_size, head_dim = k_cache.shape[1], k_cache.shape[2], head_dim_of(k_cache)
    n_rotated = q_k_v.shape[1] // head_dim - n_kv_heads
    native_ops(keep_gil=q_k_v.numel() < _LIGHT).rope_and_cache(
        code,
        first,
        first + n_rotated * head_dim * q_k_v.element_size(),
        stride,
        stride,
        n_rotated - n_kv_heads,
        n_kv_heads,
        head_dim,
        page_size,
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        0 if cos is None else cos.shape[1],
        int(wide),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        n_rows,
        int(k_cache.dtype is torch.int8),
    )


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write ``k``, ``v`` [T, n_kv_heads, D] to ``slot_mapping`` int64 [T]; negative = skip."""
    if k.is_cuda and k.dtype in _TRITON_DTYPES:
        from loraplex_kernels.triton.kv_cache import write_kv_triton

        write_kv_triton(k, v, k_cache, v_cache, slot_mapping)
        return
    dtype = k.dtype
    code = dtype_code(dtype)
    n_rows, n_kv_heads, head_dim = k.shape
    if (
        code is None
        or not _has_plain_heads(k, dtype)
        or not _has_plain_heads(v, dtype)
        or not takes_cache(k_cache, v_cache, dtype)
        or not is_plain(slot_mapping, torch.int64)
    ):
        write_kv_reference(k, v, k_cache, v_cache, slot_mapping)
        return
    native_ops(keep_gil=k.numel() < _LIGHT).rope_and_cache(
        code,
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0),
        v.stride(0),
        0,
        n_kv_heads,
        head_dim,
        k_cache.shape[2],
        None,
        None,
        0,
        1,
        None,
        slot_mapping.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        n_rows,
        int(k_cache.dtype is torch.int8),
    )


def paged_attention(
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
    planned: PlannedAttention | CapturedAttention | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Causal attention of ``q`` [T, n_heads, D] over paged keys, for decode and prefill rows.

    Rows ``query_starts[r] : query_starts[r + 1]`` belong to request ``r``. Its cache holds
    ``kv_lens[r]`` positions in the pages ``page_table[r]``, and its queries are the last positions.
    Query ``i`` of ``n`` sees positions ≤ ``kv_lens[r] - n + i``, with ``window`` only the last
    ``window`` of these. ``softcap`` is Gemma's ``c · tanh(score / c)``. ``sinks`` [n_heads] are
    scores that take a share of each head's softmax without a value (gpt-oss); with sinks the
    reference runs. Index tensors are int32. Writes and returns ``out``; rows of ``q`` and ``out``
    may be strided. With ``planned``, the plan of this step, FlashInfer runs. ``batch_invariant``:
    give a row the same bits in every batch on a GPU, as a CPU always does.
    """
    if planned is not None and planned.is_of(page_table) and sinks is None:
        out = torch.empty_like(q) if out is None else out
        planned.attend(q, k_cache, v_cache, scale=scale, window=window, softcap=softcap, out=out)
        return out
    if sinks is None and q.is_cuda and q.dtype in _TRITON_DTYPES:
        from loraplex_kernels.triton.attention import max_head_dim, paged_attention_triton

        if q.shape[2] <= max_head_dim(q.dtype):
            return paged_attention_triton(
                q,
                k_cache,
                v_cache,
                page_table,
                query_starts,
                kv_lens,
                scale=scale,
                window=window,
                softcap=softcap,
                out=out,
                batch_invariant=batch_invariant,
            )
    dtype = q.dtype
    code = dtype_code(dtype)
    n_tokens, n_heads, head_dim = q.shape
    if out is None:
        out = torch.empty((n_tokens, n_heads, head_dim), dtype=dtype, device=q.device)
    if (
        code is None
        or sinks is not None
        or not _has_plain_heads(q, dtype)
        or not _has_plain_heads(out, dtype)
        or not takes_cache(k_cache, v_cache, dtype)
        or not takes_heads(head_dim, k_cache.shape[2])
        or page_table.dtype is not torch.int32
        or page_table.stride(1) != 1
        or not is_plain(query_starts, torch.int32)
        or not is_plain(kv_lens, torch.int32)
    ):
        return paged_attention_reference(
            q,
            k_cache,
            v_cache,
            page_table,
            query_starts,
            kv_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            out=out,
        )
    native_ops(keep_gil=n_tokens <= _LIGHT_QUERIES).paged_attention(
        code,
        q.data_ptr(),
        q.stride(0),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        page_table.stride(0),
        query_starts.data_ptr(),
        kv_lens.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        kv_lens.shape[0],
        n_heads,
        k_cache.shape[1],
        head_dim,
        k_cache.shape[2],
        window or 0,
        scale,
        softcap or 0.0,
        int(k_cache.dtype is torch.int8),
    )
    return out


def _triton_norms(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype in _TRITON_DTYPES
        and weight.dtype == x.dtype
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and weight.shape[0] <= _MAX_NORM_WIDTH
    )


def _has_native_norm(x: Tensor, weight: Tensor) -> bool:
    fits = is_plain(x, weight.dtype) and takes_norm(weight, x.dtype)
    return fits and dtype_code(x.dtype) is not None


def _native_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> Tensor:
    out = torch.empty_like(x)
    width, size = weight.shape[0], x.numel()
    native_ops(keep_gil=size < _LIGHT).rms_norm(
        dtype_code(x.dtype),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        size // width,
        width,
        eps,
        offset,
    )
    return out


def _has_plain_heads(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype is dtype and x.is_cpu and x.stride()[1:] == (x.shape[2], 1)
