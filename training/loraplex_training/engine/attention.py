"""Attention over a packed batch, with gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .packed_batch import PackedBatch, Rows

_MOST_SCORES = 1 << 22  # that are kept for the backward


def attend(
    batch: PackedBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return the attention [T, heads, head_dim] of queries [T, heads, head_dim].

    Keys and values, [n, kv heads, head_dim], are of virtual tokens and of the batch behind them.

    ``window``: the number of keys that a query sees at most. ``softcap``: scores are
    softcap · tanh(score / softcap).
    """
    outs = [_attend(rows, q, k, v, scale, window, softcap) for rows in batch.rows]
    return _gather(outs[0] if len(outs) == 1 else torch.cat(outs), batch.order)


def _attend(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return the attention of padded queries, [n · q_len, heads, head_dim]."""
    n, heads, kv_heads = len(rows.starts), q.shape[1], k.shape[1]
    qs = _gather(q, rows.queries).view(n, rows.q_len, *q.shape[1:])
    ks, vs = (_gather(t, rows.keys).view(n, rows.k_len, *t.shape[1:]) for t in (k, v))
    mask = _mask(rows, window, q.device)
    if softcap is None and n * heads * rows.q_len * rows.k_len > _MOST_SCORES:
        out = functional.scaled_dot_product_attention(
            qs.transpose(1, 2),
            ks.transpose(1, 2),
            vs.transpose(1, 2),
            attn_mask=mask[:, None],
            scale=scale,
            enable_gqa=heads != kv_heads,
        )
        return out.transpose(1, 2).reshape(n * rows.q_len, heads, v.shape[2])
    # Torch's flash attention takes three times as long on a CPU for texts of some ten tokens.
    shared = heads // kv_heads  # query heads of a key head
    qs = qs.view(n, rows.q_len, kv_heads, shared, -1).permute(0, 2, 3, 1, 4)
    qs = qs.reshape(n * kv_heads, shared * rows.q_len, -1)
    ks, vs = (t.transpose(1, 2).reshape(n * kv_heads, rows.k_len, -1) for t in (ks, vs))
    scores = torch.bmm(qs * scale, ks.transpose(1, 2))
    if softcap is not None:
        scores = softcap * (scores.float() / softcap).tanh()
    scores = scores.view(n, kv_heads, shared, rows.q_len, rows.k_len)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    shares = scores.softmax(-1).to(vs.dtype).view(n * kv_heads, -1, rows.k_len)
    out = torch.bmm(shares, vs).view(n, kv_heads, shared, rows.q_len, -1)
    return out.permute(0, 3, 1, 2, 4).reshape(n * rows.q_len, heads, v.shape[2])


def _mask(rows: Rows, window: int | None, device: torch.device) -> Tensor:
    """Return bool [n, q_len, k_len], True for keys that a query sees."""
    at = rows.starts[:, None, None] + torch.arange(rows.q_len, device=device)[None, :, None]
    keys = torch.arange(rows.k_len, device=device)[None, None, :]
    mask = keys <= at
    return mask if window is None else mask & (keys > at - window)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    gathered: Tensor = _Gather.apply(x, rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Selects rows. Gradients are summed in float32, which is faster than in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.n, ctx.dtype = len(x), x.dtype
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).flatten(1)
        total = wide.new_zeros(ctx.n, wide.shape[1]).index_add_(0, rows, wide)
        return total.view(ctx.n, *grad.shape[1:]).to(ctx.dtype), None
