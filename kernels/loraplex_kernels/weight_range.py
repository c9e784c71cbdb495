"""One range of memory for the packed weights of a model, in the order of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .storage import allocate_storage

__all__ = ["WeightRange"]

_ALIGNMENT_WORDS = 16  # 64 bytes


class WeightRange:
    """Hands out pieces one behind the other, in huge pages. What is never written costs nothing.

    A step streams weights in this order: translating addresses page by page costs a few per cent of
    it. One thread.
    """

    def __init__(self, n_words: int) -> None:
        """``n_words``: 32-bit words that are taken at most, each piece in full 64 bytes."""
        self._memory = allocate_storage(n_words, torch.int32, torch.device("cpu"))
        self._n_taken = 0

    @property
    def n_bytes(self) -> int:
        """That can be taken in all."""
        return self._memory.nbytes

    @staticmethod
    def words_of(n_words: int) -> int:
        """What a piece of ``n_words`` takes."""
        return -(-n_words // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS

    def take(self, n_words: int) -> Tensor:
        """int32 [n_words], not initialised."""
        first, end = self._n_taken, self._n_taken + self.words_of(n_words)
        if end > self._memory.shape[0]:
            raise ValueError(
                f"{n_words} words do not fit: {self._memory.shape[0] - first} are left"
            )
        self._n_taken = end
        return self._memory[first : first + n_words]
