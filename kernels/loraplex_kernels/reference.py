"""The definition of the LoRA operator in PyTorch, and the path taken where nothing faster runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .exponent_coding import EXPONENT_CODED, decode_rows
from .layout import NO_PAGE, PAGE_RANK, LoraSegments, LoraTables, LoraTarget

__all__ = ["LoraGradients", "lora_apply_reference", "lora_gradient_reference"]


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


class LoraGradients(NamedTuple):
    x: Tensor  # [n_rows, in_features]
    out: Tensor  # [n_rows, Σ out_features], with respect to what the deltas were added to
    a: dict[tuple[int, int], Tensor]  # (slot, slice) → [rank, in_features]
    b: dict[tuple[int, int], Tensor]  # (slot, slice) → [rank, out_features of the slice], of Bᵀ


def lora_gradient_reference(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: LoraSegments,
    grad: Tensor,
) -> LoraGradients:
    """What ``lora_apply_reference`` passes back of ``grad`` [n_rows, Σ out_features].

    With g the part of a segment's rows and slice behind scale and weight, u = x Aᵀ:

        dx += (g B) A      dA += (g B)ᵀ x      dBᵀ += uᵀ g

    Segments are taken last first, as a row's later ones scale what earlier ones added.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad = grad.to(compute, copy=True)
    found = LoraGradients(torch.zeros_like(x, dtype=compute), grad, {}, {})
    indptr = segments.indptr.tolist()
    slots = segments.slots.tolist()
    for index in reversed(range(len(slots))):
        if slots[index] < 0 or indptr[index] == indptr[index + 1]:
            continue
        pairs = slice(indptr[index], indptr[index + 1])
        rows = segments.indices[pairs].long()
        weights = None if segments.weights is None else segments.weights[pairs].to(compute)
        _add_gradients(x, storage, target, tables, slots[index], rows, weights, found)
    return found


def _add_gradients(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    slot: int,
    rows: Tensor,
    weights: Tensor | None,
    found: LoraGradients,
) -> None:
    compute = found.x.dtype
    x_rows = x[rows].to(compute)
    first = 0
    for i, width in enumerate(target.out_features):
        columns = slice(first, first + width)
        first += width
        scale = int(tables.scale[slot, i])
        if scale != NO_PAGE:
            found.out[rows, columns] *= storage[scale : scale + width].to(compute)
        rank = int(tables.ranks[slot, i])
        if rank == 0:
            continue
        a = _read_factor(storage, tables.a_pages[slot, i], rank, target.in_features).to(compute)
        b = _read_factor(storage, tables.b_pages[slot, i], rank, width).to(compute)
        g = found.out[rows, columns]
        if weights is not None:
            g = g * weights[:, None]
        du = g @ b.T
        found.x[rows] += du @ a
        for gradients, value in ((found.a, du.T @ x_rows), (found.b, (x_rows @ a.T).T @ g)):
            gradients[slot, i] = gradients.get((slot, i), 0) + value


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
