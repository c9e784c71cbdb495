"""What the router needs of a sentence encoder, and a cache in front of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CachedEncoder", "Encoder"]


class Encoder(Protocol):
    """Turns texts into vectors whose dot product is their similarity. One thread at a time."""

    @property
    def dim(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 [n_texts, dim], each of unit length, on the CPU. Long texts may be cut."""


class CachedEncoder:
    """An ``Encoder`` that encodes each text once while it is remembered (least recent goes)."""

    def __init__(self, encoder: Encoder, *, n_remembered: int = 4096) -> None:
        self._encoder = encoder
        self._n_remembered = n_remembered
        self._vectors: OrderedDict[str, Tensor] = OrderedDict()
        self.n_encoded = 0

    @property
    def dim(self) -> int:
        return self._encoder.dim

    def encode(self, texts: Sequence[str]) -> Tensor:
        missing = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        fresh: dict[str, Tensor] = {}
        if missing:
            fresh = dict(zip(missing, self._encoder.encode(missing), strict=True))
            self.n_encoded += len(missing)
        rows = []
        for text in texts:
            if text in self._vectors:
                self._vectors.move_to_end(text)
            rows.append(fresh[text] if text in fresh else self._vectors[text])
        self._vectors.update(fresh)
        while len(self._vectors) > self._n_remembered:
            self._vectors.popitem(last=False)
        return torch.stack(rows) if rows else torch.empty(0, self.dim)
