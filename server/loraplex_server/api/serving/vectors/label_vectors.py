"""Vectors of label texts, kept for later requests. Event loop only."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor

Key = tuple[bytes, str, str]  # digest of the text, digest of the adapter, tenant with its salt
_MAX_VECTORS = 8192


class LabelVectors:
    """A cache of the texts that images are compared with, the longest unused dropped first.

    A vector depends on the text and on the adapter. Tenants do not share vectors, so that the time
    of an answer tells nobody which labels others use.
    """

    def __init__(self) -> None:
        self._vectors: OrderedDict[Key, Tensor] = OrderedDict()

    @staticmethod
    def key(text: str, adapter: str, salt: str) -> Key:
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest(), adapter, salt

    def get(self, key: Key) -> Tensor | None:
        """Return the normalised vector [width], or None."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: Key, vector: Tensor) -> None:
        self._vectors[key] = vector
        while len(self._vectors) > _MAX_VECTORS:
            self._vectors.popitem(last=False)
