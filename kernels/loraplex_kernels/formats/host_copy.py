"""Asynchronous copies of small arrays to the device, all of a step in one copy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes: Triton compiles other code for smaller alignments


def move_together(
    arrays: Sequence[NDArray[Any]], device: torch.device, *, into: Tensor | None = None
) -> list[Tensor]:
    """Copy the arrays to one block of device memory; return tensors of their dtypes and shapes.

    ``into`` uint8 is the block if its address must be fixed (``place_together``); else a new one is
    allocated. On a CPU without ``into`` the arrays are not copied. The copy runs on the current
    stream, from page-locked memory that torch reuses only afterwards.
    """
    if device.type == "cpu" and into is None:
        return [torch.from_numpy(array) for array in arrays]
    starts, n_bytes = _offsets([array.nbytes for array in arrays])
    pinned = device.type != "cpu" and torch.cuda.is_available()
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
    memory = host.numpy()
    for array, start in zip(arrays, starts, strict=True):
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    moved = torch.empty(n_bytes, dtype=torch.uint8, device=device) if into is None else into
    moved[:n_bytes].copy_(host, non_blocking=True)
    return [
        _view(moved, start, torch.from_numpy(array[:0]).dtype, array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def place_together(into: Tensor, parts: Sequence[tuple[torch.dtype, int]]) -> list[Tensor]:
    """Return views of ``into`` where ``move_together`` puts arrays of these dtypes and lengths."""
    starts, _ = _offsets([dtype.itemsize * length for dtype, length in parts])
    return [
        _view(into, start, dtype, (length,))
        for (dtype, length), start in zip(parts, starts, strict=True)
    ]


def bytes_together(parts: Sequence[tuple[torch.dtype, int]]) -> int:
    """Return the bytes that ``into`` needs for these arrays."""
    return _offsets([dtype.itemsize * length for dtype, length in parts])[1]


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return the offset of each array and the bytes of all."""
    starts, n_bytes = [], 0
    for size in sizes:
        starts.append(n_bytes)
        n_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, n_bytes


def _view(memory: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    n_bytes = dtype.itemsize * math.prod(shape)
    return memory[start : start + n_bytes].view(dtype).view(shape)
