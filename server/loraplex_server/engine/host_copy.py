"""Small arrays to the device: all of a step in one copy, which nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["bytes_together", "move_together", "place_together"]

_ALIGNMENT = 16  # bytes: Triton compiles other code for pointers that have less


def move_together(
    arrays: Sequence[NDArray[Any]], device: torch.device, *, into: Tensor | None = None
) -> list[Tensor]:
    """The arrays as tensors of the same dtypes and shapes, in one piece of the device's memory.

    ``into`` uint8 is that memory, if it must have a fixed place (``place_together``); else it is
    new. On a CPU without ``into`` each array stays where it is. The copy runs on the current
    stream, out of page-locked memory that torch hands to nobody else before it is through.
    """
    if device.type == "cpu" and into is None:
        return [torch.from_numpy(array) for array in arrays]
    starts, n_bytes = _places([array.nbytes for array in arrays])
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
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
    """Where ``move_together`` puts its first arrays if they have these dtypes and lengths."""
    starts, _ = _places([dtype.itemsize * length for dtype, length in parts])
    return [
        _view(into, start, dtype, (length,))
        for (dtype, length), start in zip(parts, starts, strict=True)
    ]


def bytes_together(parts: Sequence[tuple[torch.dtype, int]]) -> int:
    """The length of ``into`` that holds these."""
    return _places([dtype.itemsize * length for dtype, length in parts])[1]


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each starts, and the bytes of all."""
    starts, n_bytes = [], 0
    for size in sizes:
        starts.append(n_bytes)
        n_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, n_bytes


def _view(memory: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    n_bytes = dtype.itemsize * math.prod(shape)
    return memory[start : start + n_bytes].view(dtype).view(shape)
