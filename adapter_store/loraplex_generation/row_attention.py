"""Attention in a packed batch, where a row sees its adapter's head and itself and no other row.

packed   [ head | row 1 | row 2 | … ]                  what the linears get: nothing is padded
blocks   [ head ]   [ row 1 ··· ]   [ row 4 ········ ]   what attention gets: rows of like lengths
                    [ row 2     ]   [ row 5          ]   side by side, the keys of the head before

One mask over the packed batch would be square in its length, and nearly all of it zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Block", "RowPlan", "attend"]

_STRETCH = 1.5  # the longest row of a block, by its shortest


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that attend side by side."""

    n_rows: int
    longest: int
    owner: Tensor | None  # int64 [n_rows]: whose head comes before; None: nothing does


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How packed tokens, [n_adapters · length], become blocks, [Σ n_rows · longest], and return."""

    blocks: tuple[Block, ...]  # the first has the heads, one for each adapter, if there are any
    gather: Tensor  # int64 [Σ n_rows · longest]: the packed token; any at the end of a short row
    pads: Tensor  # bool, of the same shape: past the end of a row
    scatter: Tensor  # int64 [n_adapters · length]: the place in the blocks; any for what no row has
    unused: Tensor | None  # bool [n_adapters · length]: in no row; None: there is no such token

    @classmethod
    def of(cls, n_head: int, groups: Sequence[Sequence[int]], length: int) -> RowPlan:
        """`groups`: for each adapter, the lengths of its rows, which follow the head."""
        rows = []  # (first token, length, adapter)
        for g, lengths in enumerate(groups):
            at = g * length + n_head
            for n in lengths:
                rows.append((at, n, g))
                at += n
        rows.sort(key=lambda row: row[1])
        parts: list[list[tuple[int, int, int]]] = []
        for row in rows:
            if not parts or row[1] > _STRETCH * parts[-1][0][1]:
                parts.append([])
            parts[-1].append(row)
        if n_head:
            parts.insert(0, [(g * length, n_head, g) for g in range(len(groups))])
        blocks, gather, pads = [], [], []
        for i, part in enumerate(parts):
            longest = max(n for _, n, _ in part)
            owner = torch.tensor([g for _, _, g in part]) if n_head and i else None
            blocks.append(Block(len(part), longest, owner))
            within = torch.arange(longest)
            first = torch.tensor([at for at, _, _ in part])[:, None]
            ends = torch.tensor([n for _, n, _ in part])[:, None]
            is_pad = within >= ends
            gather.append((first + within).masked_fill(is_pad, 0).flatten())
            pads.append(is_pad.flatten())
        taken, is_pad = torch.cat(gather), torch.cat(pads)
        scatter = torch.full((len(groups) * length,), -1)
        real = (~is_pad).nonzero()[:, 0]
        scatter[taken[real]] = real
        unused = scatter < 0
        return cls(
            tuple(blocks),
            taken,
            is_pad,
            scatter.clamp(min=0),
            unused if bool(unused.any()) else None,
        )


def attend(x: Tensor, plan: RowPlan, n_heads: int, n_kv_heads: int) -> Tensor:
    """`x` [n_adapters · length, n_heads + 2 · n_kv_heads, head_dim]: q, k and v, positions in them.

    Returns [n_adapters · length, n_heads · head_dim]; zero is not promised where no row is.
    """
    rows: Tensor = _ToBlocks.apply(x, plan)  # type: ignore[no-untyped-call]
    parts = torch.split(rows, [block.n_rows * block.longest for block in plan.blocks])
    heads = parts[0].view(plan.blocks[0].n_rows, -1, *x.shape[1:])
    outputs = []
    for block, part in zip(plan.blocks, parts, strict=True):
        own = part.view(block.n_rows, block.longest, *x.shape[1:])
        q, kv = own[:, :, :n_heads], own[:, :, n_heads:]
        if block.owner is not None:
            kv = torch.cat([heads[block.owner, :, n_heads:], kv], 1)
        outputs.append(_softmax_attention(q, kv, n_kv_heads).reshape(len(part), -1))
    out: Tensor = _FromBlocks.apply(torch.cat(outputs), plan)  # type: ignore[no-untyped-call]
    return out


def _softmax_attention(q: Tensor, kv: Tensor, n_kv: int) -> Tensor:
    """`q` [n_rows, n, n_heads, head_dim], `kv` [n_rows, m, 2 n_kv, head_dim] → as `q`.

    The last n of the m keys are those of the queries, in order. Spelled out: at these lengths the
    fused CPU kernel's backward takes three times as long.
    """
    n_rows, n, n_heads, width = q.shape
    m, group = kv.shape[1], n_heads // n_kv
    q = (q * width**-0.5).view(n_rows, n, n_kv, group, width).permute(0, 2, 3, 1, 4)
    k, v = kv.view(n_rows, m, 2, n_kv, width).permute(2, 0, 3, 1, 4).unbind(0)
    k, v = k.reshape(-1, m, width), v.reshape(-1, m, width)
    scores = torch.bmm(q.reshape(-1, group * n, width), k.transpose(1, 2))
    future = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    bias = torch.zeros(n, m, dtype=q.dtype).masked_fill_(future, -torch.inf)
    probabilities = (scores.view(-1, n, m) + bias).softmax(-1)
    out = torch.bmm(probabilities.view(-1, group * n, m), v)
    return out.view(n_rows, n_kv, group, n, width).permute(0, 3, 1, 2, 4)


class _ToBlocks(torch.autograd.Function):
    """What stands at the end of a short row gets no gradient: it is behind all that is asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _kept(grads[0].index_select(0, ctx.plan.scatter), ctx.plan.unused), None


class _FromBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.scatter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _kept(grads[0].index_select(0, ctx.plan.gather), ctx.plan.pads), None


def _kept(x: Tensor, without: Tensor | None) -> Tensor:
    if without is None:
        return x
    return x.masked_fill_(without.view(-1, *[1] * (x.dim() - 1)), 0)
