"""The flat memory of a pool or of packed weights."""

import ctypes
import sys

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14
_PAGE_BYTES = 4096
_ALIGNMENT_WORDS = 16  # 64 bytes


def allocate_storage(n_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a flat tensor that is not initialised and starts at a multiple of 64 bytes.

    On a CPU, pages that nobody wrote take no physical memory. On Linux the tensor asks for huge
    pages: factors are streamed once a step, and address translation is a large part of that time.
    Linux grants huge pages to separate mappings only, so allocate one large storage and cut it.
    Pieces below 32 MB may come from the heap.
    """
    slack = 64 // dtype.itemsize
    whole = torch.empty(n_elements + slack, dtype=dtype, device=device)
    skip = (-whole.data_ptr() % 64) // dtype.itemsize
    storage = whole[skip : skip + n_elements]
    if device.type == "cpu" and sys.platform == "linux":
        _ask_for_huge_pages(storage)
    return storage


class WeightRange:
    """Hands out consecutive pieces of memory in huge pages. Used by one thread.

    A step streams weights in this order. Translating addresses of small pages would cost a few per
    cent of the step. Memory that is never written takes no space.
    """

    def __init__(self, n_words: int) -> None:
        """``n_words``: capacity in 32-bit words. Each piece takes a multiple of 64 bytes."""
        self._memory = allocate_storage(n_words, torch.int32, torch.device("cpu"))
        self._n_taken = 0

    @property
    def n_bytes(self) -> int:
        """Total capacity in bytes."""
        return self._memory.nbytes

    @staticmethod
    def words_of(n_words: int) -> int:
        """Return the words that a piece of ``n_words`` takes."""
        return -(-n_words // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS

    def take(self, n_words: int) -> Tensor:
        """Return the next piece, int32 [n_words], not initialised. Raises ValueError if full."""
        first, end = self._n_taken, self._n_taken + self.words_of(n_words)
        if end > self._memory.shape[0]:
            raise ValueError(
                f"{n_words} words do not fit: {self._memory.shape[0] - first} are left"
            )
        self._n_taken = end
        return self._memory[first : first + n_words]


def _ask_for_huge_pages(storage: Tensor) -> None:
    start = -(-storage.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    length = (storage.data_ptr() + storage.nbytes - start) // _PAGE_BYTES * _PAGE_BYTES
    if length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
