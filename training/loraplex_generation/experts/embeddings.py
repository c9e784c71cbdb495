"""Embeddings of descriptions, kept for later requests."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Encode = Callable[[Sequence[str]], Tensor]  # texts → float32 [n_texts, width], length 1
_MAX_KEPT = 10_000


class KeptEmbeddings:
    """An `Encode` that computes each text once. Thread-safe."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._kept: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings [n_texts, width] of texts. Those of earlier calls are kept."""
        kept = self._kept
        fresh = [text for text in dict.fromkeys(texts) if text not in kept]
        if fresh:
            if len(kept) > _MAX_KEPT:
                self._kept = kept = {}
                fresh = list(dict.fromkeys(texts))
            kept.update(zip(fresh, self._encode(fresh), strict=True))
        return torch.stack([kept[text] for text in texts])
