"""Small arrays to the device: all of a step in one copy, which nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["move_together"]

_ALIGNMENT = 16  # bytes: Triton compiles other code for pointers that have less


def move_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of the same dtypes and shapes, in one piece of the device's memory.

    On a CPU each stays where it is. Elsewhere the copy runs on the current stream, out of
    page-locked memory that torch hands to nobody else before it is through.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts, n_bytes = [], 0
    for array in arrays:
        starts.append(n_bytes)
        n_bytes += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    memory = host.numpy()
    for array, start in zip(arrays, starts, strict=True):
        memory[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    moved = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    moved.copy_(host, non_blocking=True)
    return [
        moved[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
