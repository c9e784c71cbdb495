"""Rows of a tensor that is kept from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowBuffer"]


class RowBuffer:
    """Hands out the first rows of one tensor. One thread.

    A megabyte of fresh memory costs a page fault for every 4 KiB, each step anew.
    """

    def __init__(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._tensor = torch.empty((capacity, width), dtype=dtype, device=device)

    def rows(self, n_rows: int) -> Tensor:
        """[n_rows, width], with whatever was written last; overwritten by the next caller.

        More rows than the capacity come in fresh memory, which is not kept.
        """
        if n_rows > self._tensor.shape[0]:
            return self._tensor.new_empty((n_rows, self._tensor.shape[1]))
        return self._tensor[:n_rows]
