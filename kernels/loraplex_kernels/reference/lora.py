"""The definition of the LoRA operator in PyTorch. It runs where no faster version does."""

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import NO_PAGE, PAGE_RANK, LoraSegments, LoraTables


def lora_apply_reference(
    x: Tensor, tables: LoraTables, segments: LoraSegments, *, out: Tensor
) -> None:
    """Add each segment's low-rank product to ``out`` in place.

    ``x`` [n_rows, in_features] and ``out`` [n_rows, Σ out_features] may have any row stride. Each
    (segment, slice) takes two products in float32 (float64 stays float64). Factors are not gathered
    for each token. A row of several experts accumulates in segment order. Pages are not coded: only
    native code reads coded pages.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    indptr = segments.indptr.tolist()
    for index, slot in enumerate(segments.slots.tolist()):
        if slot < 0 or indptr[index] == indptr[index + 1]:
            continue
        pairs = slice(indptr[index], indptr[index + 1])
        rows = segments.indices[pairs].long()
        weights = None if segments.weights is None else segments.weights[pairs].to(compute)
        _apply_segment(x, tables, slot, rows, weights, out, compute)


def _apply_segment(
    x: Tensor,
    tables: LoraTables,
    slot: int,
    rows: Tensor,
    weights: Tensor | None,
    out: Tensor,
    compute: torch.dtype,
) -> None:
    target, storage = tables.target, tables.storage
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
        parts.append(storage[offset : offset + n_rows * width].view(n_rows, width))
    return torch.cat(parts)
