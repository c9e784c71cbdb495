"""Intruder dimensions of generated adapters: how far they bend the base's strongest directions."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.spectrum import intruders_among
from loraplex_generation.frozen_base import FrozenBase
from loraplex_generation.layout import PROJECTIONS, AdapterLayout

__all__ = ["IntruderCount"]


class IntruderCount:
    """Counts in the first, middle and last adapted layer; the base is decomposed once."""

    def __init__(self, base: FrozenBase, layout: AdapterLayout) -> None:
        self._layout = layout
        self._a = layout.frozen_a()
        layers = layout.layers
        self._weights = {
            (layer, p): base.projection(layer, p)
            for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]})
            for p in PROJECTIONS
        }
        self._bases = {
            key: torch.linalg.svd(weight, full_matrices=False)[0]
            for key, weight in self._weights.items()
        }

    def mean(self, vectors: Tensor) -> float:
        """Mean over adapters [n, layout.size] and modules, of the ten strongest directions each."""
        counts = []
        for vector in vectors:
            b = self._layout.unflatten(vector.float())
            for key, weight in self._weights.items():
                tuned = weight + self._layout.scale * b[key] @ self._a[key]
                counts.append(intruders_among(self._bases[key], tuned).n_intruders)
        return sum(counts) / len(counts)
