"""Page-locked host memory for packed adapters, in slabs.

torch rounds each page-locked allocation up to a power of two, and the driver takes its locks for
each. Here a tensor takes its own bytes of a slab, and slabs are allocated rarely.
"""

import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from .extents import ExtentAllocator

SLAB_BYTES = 256 << 20
_ALIGNMENT = 64  # bytes, of the copy engine and of the pool


class PinnedMemory:
    """Allocates page-locked tensors. Any thread, with the device current.

    The memory of a tensor is free again when no view of it is left. Copies to the device must be
    over by then, since torch's own events do not cover a slab.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slabs: list[tuple[Tensor, ExtentAllocator]] = []
        # Extents that are to be freed: a destructor may run while its thread holds the lock.
        self._released: deque[tuple[ExtentAllocator, int, int]] = deque()

    @property
    def bytes_total(self) -> int:
        """The bytes of all slabs. Slabs are kept."""
        return sum(slab.nbytes for slab, _ in self._slabs)

    def empty(self, n_elements: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor [n_elements]. Raises the driver's errors."""
        n_bytes = n_elements * dtype.itemsize
        n_units = -(-n_bytes // _ALIGNMENT)
        if n_units == 0:
            return torch.empty(0, dtype=dtype)
        with self._lock:
            while self._released:
                extents, start, length = self._released.popleft()
                extents.free(start, length)
            slab, extents, start = self._take(n_units)
        memory = slab.numpy()[start * _ALIGNMENT :][:n_bytes]
        # ``from_numpy`` keeps this array as long as any view of the tensor lives.
        owner = weakref.finalize(memory, self._released.append, (extents, start, n_units))
        owner.atexit = False
        return torch.from_numpy(memory).view(dtype)

    def _take(self, n_units: int) -> tuple[Tensor, ExtentAllocator, int]:
        for slab, extents in self._slabs:
            start = extents.take(n_units)
            if start is not None:
                return slab, extents, start
        n_bytes = max(SLAB_BYTES, 1 << (n_units * _ALIGNMENT - 1).bit_length())
        slab = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        extents = ExtentAllocator(n_bytes // _ALIGNMENT)
        self._slabs.append((slab, extents))
        start = extents.take(n_units)
        assert start is not None
        return slab, extents, start
