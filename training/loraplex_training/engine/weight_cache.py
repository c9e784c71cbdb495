"""A cache of weights that are costly to read."""

from collections.abc import Callable

import torch
from torch import Tensor

_MAX_BYTES = 512 << 20


class WeightCache:
    """Caches the results of readers, up to a number of bytes. Owned by one thread.

    A served base holds its weights packed. To unpack them takes a third of a step of eight short
    pairs, and each step reads them twice. Of a larger base only the first layers are cached.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._entries: dict[object, Tensor] = {}
        self._n_bytes = 0

    def reader(self, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function like ``read`` whose result has the dtype and may be cached."""
        key = object()

        def cached() -> Tensor:
            weights = self._entries.get(key)
            if weights is None:
                weights = read().to(self._dtype)
                if self._n_bytes + weights.nbytes <= _MAX_BYTES:
                    self._entries[key] = weights
                    self._n_bytes += weights.nbytes
            return weights

        return cached

    def clear(self) -> None:
        self._entries.clear()
        self._n_bytes = 0
