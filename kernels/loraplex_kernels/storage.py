"""The flat memory behind a pool."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

__all__ = ["allocate_storage"]

_MADV_HUGEPAGE = 14
_PAGE_BYTES = 4096


def allocate_storage(n_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor, not initialised: on a CPU, memory that nobody wrote costs nothing real.

    Starts at a multiple of 64 bytes. On Linux the kernel is asked for huge pages: factors are
    streamed once a step, and address translation is a good part of that. It gives them to memory of
    its own, not to the heap's, so ask for one large storage and cut it: pieces below 32 MB may be
    the heap's.
    """
    slack = 64 // dtype.itemsize
    whole = torch.empty(n_elements + slack, dtype=dtype, device=device)
    skip = (-whole.data_ptr() % 64) // dtype.itemsize
    storage = whole[skip : skip + n_elements]
    if device.type == "cpu" and sys.platform == "linux":
        _ask_for_huge_pages(storage)
    return storage


def _ask_for_huge_pages(storage: Tensor) -> None:
    start = -(-storage.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    length = (storage.data_ptr() + storage.nbytes - start) // _PAGE_BYTES * _PAGE_BYTES
    if length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
