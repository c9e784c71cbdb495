"""Scales of a linear's inputs by adapter (IA³'s in the MLP, LoFiT's heads), for recorded steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import NO_PAGE

__all__ = [
    "scale_inputs",
    "scale_inputs_of_each",
    "scale_inputs_of_each_reference",
    "scale_inputs_reference",
]


def scale_inputs(x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor) -> None:
    """Multiplies in place each row of ``x`` [n_rows, width] by its adapter's vector, if it has one.

    ``row_slots`` int32 [n_rows], negative = no adapter; ``offsets`` int64 [n_slots]: where in the
    storage, which has x's dtype, the vector of each slot begins, or NO_PAGE. On a GPU one launch,
    which depends on shapes alone; on a CPU the rows' slots are read.
    """
    if not x.is_cuda:
        scale_inputs_reference(x, row_slots, storage, offsets)
        return
    from .triton import scale_inputs_triton  # imports Triton, which a CPU does not need

    scale_inputs_triton(x, row_slots, storage, offsets)


def scale_inputs_reference(x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor) -> None:
    """``scale_inputs`` in PyTorch, one adapter after the other."""
    for slot in sorted({int(slot) for slot in row_slots.tolist() if slot >= 0}):
        offset = int(offsets[slot])
        if offset != NO_PAGE:
            rows = torch.nonzero(row_slots == slot).flatten()
            x[rows] = x[rows] * storage[offset : offset + x.shape[1]]


def scale_inputs_of_each(x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor) -> Tensor:
    """What each of several linears reads of the input that they share, [n_linears, n_rows, width].

    ``x`` [n_rows, width] stays; ``offsets`` int64 [n_slots, n_linears], all else as of
    ``scale_inputs``. Rows without a vector are copied.
    """
    if not x.is_cuda:
        return scale_inputs_of_each_reference(x, row_slots, storage, offsets)
    from .triton import scale_inputs_of_each_triton  # imports Triton, which a CPU does not need

    out = x.new_empty(offsets.shape[1], *x.shape)
    scale_inputs_of_each_triton(x, row_slots, storage, offsets, out=out)
    return out


def scale_inputs_of_each_reference(
    x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor
) -> Tensor:
    """``scale_inputs_of_each`` in PyTorch."""
    copies = x.repeat(offsets.shape[1], 1, 1)
    for copy, of_one in zip(copies, offsets.T, strict=True):
        scale_inputs_reference(copy, row_slots, storage, of_one)
    return copies
