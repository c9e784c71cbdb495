"""The experts near a description, their weights, and SG-LoRA's condition."""

from dataclasses import dataclass

import torch
from torch import Tensor

_GRID_K = (1, 2, 3, 4, 6, 8)
_GRID_TAU = (0.02, 0.04, 0.07, 0.12, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """SG-LoRA's α: softmax(cosine / tau) over the k experts with the largest cosines."""

    k: int = 4
    tau: float = 0.05

    def weights(self, similarities: Tensor, hide: Tensor | None = None) -> Tensor:
        """Return α [n, n_experts], whose rows sum to one, for cosines [n, n_experts].

        ``hide`` bool [n, n_experts] marks experts that get no weight. One expert of each row stays.
        """
        if hide is not None:
            similarities = similarities.masked_fill(hide, float("-inf"))
        top = similarities.topk(min(self.k, similarities.shape[-1]), -1)
        weights = (top.values / self.tau).softmax(-1)
        return torch.zeros_like(similarities).scatter(-1, top.indices, weights)


def condition(alpha: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ* and σ*² [n, n_points] of the mixtures α [n, n_experts] of points.

    μ* = Σ α_k μ_k,   σ*² = Σ α_k (μ_k − μ*)²

    The paper adds Σ α_k σ_k², the variance over the last epochs of each expert's training. A store
    holds one sample of each expert, so it is zero.
    """
    mu = alpha @ points
    return mu, (alpha @ points.square() - mu.square()).clamp_min(0.0)


def choose_neighbours(similarities: Tensor, points: Tensor) -> Neighbours:
    """Return the k and τ that best predict each expert from the others.

    ``similarities``: cosines [n_experts, n_experts] of the descriptions.
    """
    hide = torch.eye(len(points), dtype=torch.bool)

    def error(neighbours: Neighbours) -> float:
        return float((neighbours.weights(similarities, hide) @ points - points).square().mean())

    ks = [k for k in _GRID_K if k < len(points)]
    return min((Neighbours(k, tau) for k in ks for tau in _GRID_TAU), key=error)
