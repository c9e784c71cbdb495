"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353).

    y = (m / ‖W + s B A‖) ⊙ (W + s B A) x + b,   m starts as ‖W‖;   norms of rows

The norm gets no gradient (section 4.3 of the paper), as in PEFT.
"""

import torch
from torch import Tensor

from loraplex_training.config import AdapterShape
from loraplex_training.engine.adapter import PREFIX, LearningAdapter
from loraplex_training.recipes.recipe import Start


class Dora(LearningAdapter):
    """A DoRA. Its norms are computed once a step."""

    def __init__(self, start: Start, shape: AdapterShape) -> None:
        """Start from PEFT's initial values."""
        plain = start.fresh()
        super().__init__(start.shape, plain.factors, start.seed)
        self._weight = start.weight
        self._magnitudes = {
            name: start.weight(name).norm(dim=1).requires_grad_() for name in self.factors
        }
        for name, magnitude in self._magnitudes.items():
            self.parameters[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
        self._norms: dict[str, Tensor] = {}

    @property
    def gains(self) -> dict[str, Tensor]:
        return {n: m / self._current_norms()[n] for n, m in self._magnitudes.items()}

    def refresh(self) -> None:
        self._norms = {}

    def peft_config(self, base_name: str) -> dict[str, object]:
        return super().peft_config(base_name) | {"use_dora": True}

    @torch.no_grad()
    def _current_norms(self) -> dict[str, Tensor]:
        """Return ‖W + s B A‖ of the rows [out], from products of rank-sized matrices."""
        for name, (a, b) in self.factors.items() if not self._norms else ():
            weight, scaled = self._weight(name), self.shape.scale * b
            square = weight.square().sum(1) + 2 * ((weight @ a.t()) * scaled).sum(1)
            square += ((scaled @ (a @ a.t())) * scaled).sum(1)
            self._norms[name] = square.clamp_min(0).sqrt()
        return self._norms
