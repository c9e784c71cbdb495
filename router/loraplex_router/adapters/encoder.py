"""The router's contract of a sentence encoder, and a cache for it."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Encoder(Protocol):
    """Encodes texts as vectors whose dot product is their similarity. One thread at a time."""

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [n_texts, dim], unit length, on the CPU. Long texts may be truncated."""


class CachedEncoder:
    """An ``Encoder`` with a least-recently-used cache of vectors."""

    def __init__(self, encoder: Encoder, *, n_remembered: int = 4096) -> None:
        self._encoder = encoder
        self._n_remembered = n_remembered
        self._vectors: OrderedDict[str, Tensor] = OrderedDict()
        self.n_encoded = 0

    @property
    def dim(self) -> int:
        return self._encoder.dim

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Return the texts that are not in the cache, each once."""
        return list(dict.fromkeys(text for text in texts if text not in self._vectors))

    def remember(self, vectors: Mapping[str, Tensor]) -> None:
        """Add texts with the vectors that the encoder made of them."""
        self._vectors.update(vectors)
        while len(self._vectors) > self._n_remembered:
            self._vectors.popitem(last=False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        missing = self.missing(texts)
        fresh: dict[str, Tensor] = {}
        if missing:
            fresh = dict(zip(missing, self._encoder.encode(missing), strict=True))
            self.n_encoded += len(missing)
        rows = []
        for text in texts:
            if text in self._vectors:
                self._vectors.move_to_end(text)
            rows.append(fresh[text] if text in fresh else self._vectors[text])
        self.remember(fresh)
        return torch.stack(rows) if rows else torch.empty(0, self.dim)
