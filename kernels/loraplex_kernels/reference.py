"""The definition of the LoRA operator in PyTorch, and the path taken where nothing faster runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .exponent_coding import EXPONENT_CODED, decode_rows
from .layout import NO_PAGE, PAGE_RANK, LoraSegments, LoraTables, LoraTarget

__all__ = ["lora_apply_reference"]


def lora_apply_reference(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: LoraSegments,
    *,
    out: Tensor,
) -> None:
    """Adds each segment's low-rank product to ``out`` in place.

    ``x`` [n_rows, in_features], ``out`` [n_rows, Σ out_features]; both row-major with any row
    stride. One GEMM pair per (segment, slice) in float32 (float64 stays float64); weights are never
    gathered per token. Rows of routed experts accumulate in segment order.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    indptr = segments.indptr.tolist()
    for index, slot in enumerate(segments.slots.tolist()):
        if slot < 0 or indptr[index] == indptr[index + 1]:
            continue
        pairs = slice(indptr[index], indptr[index + 1])
        rows = segments.indices[pairs].long()
        weights = None if segments.weights is None else segments.weights[pairs].to(compute)
        _apply_segment(x, storage, target, tables, slot, rows, weights, out, compute)


def _apply_segment(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    slot: int,
    rows: Tensor,
    weights: Tensor | None,
    out: Tensor,
    compute: torch.dtype,
) -> None:
    x_rows = x[rows].to(compute)
    first = 0
    for i, width in enumerate(target.out_features):
        columns = slice(first, first + width)
        first += width
        rank = int(tables.ranks[slot, i])
        scale, bias = int(tables.scale[slot, i]), int(tables.bias[slot, i])
        if rank == 0 and scale == NO_PAGE and bias == NO_PAGE:
            continue
        y = out[rows, columns].to(compute)
        if rank:
            a = _read_factor(storage, tables.a_pages[slot, i], rank, target.in_features)
            b = _read_factor(storage, tables.b_pages[slot, i], rank, width)
            delta = (x_rows @ a.to(compute).T) @ b.to(compute)
            y += delta if weights is None else delta * weights[:, None]
        if scale != NO_PAGE:
            y *= storage[scale : scale + width].to(compute)
        if bias != NO_PAGE:
            y += storage[bias : bias + width].to(compute)
        out[rows, columns] = y.to(out.dtype)


def _read_factor(storage: Tensor, pages: Tensor, rank: int, width: int) -> Tensor:
    parts = []
    for page, first in enumerate(range(0, rank, PAGE_RANK)):
        n_rows = min(PAGE_RANK, rank - first)
        offset = int(pages[page])
        if offset & EXPONENT_CODED:
            parts.append(decode_rows(storage, offset - EXPONENT_CODED, n_rows, width))
        else:
            parts.append(storage[offset : offset + n_rows * width].view(n_rows, width))
    return torch.cat(parts)
