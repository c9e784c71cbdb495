"""Experts near a description: similarities and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["Neighbours", "choose_neighbours", "condition"]

_GRID_K = (1, 2, 3, 4, 6, 8)
_GRID_TAU = (0.02, 0.04, 0.07, 0.12, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The top-k experts by centred cosine, softmax(cosine / tau) over them (SG-LoRA's α)."""

    embeddings: Tensor  # float32 [n_tasks, width]: mean of each task's wordings, length 1
    k: int
    tau: float

    def similarities(self, query: Tensor) -> Tensor:
        """[n, n_tasks] for sentence embeddings [n, width]; the library's mean is taken out."""
        mean = self.embeddings.mean(0)
        return F.normalize(query - mean, dim=-1) @ F.normalize(self.embeddings - mean, dim=-1).T

    def weights(
        self, query: Tensor, *, hide: Tensor | None = None, k: int | None = None, even: bool = False
    ) -> Tensor:
        """α [n, n_tasks], rows sum to one. `hide` bool [n, n_tasks]: experts not to be used."""
        similarity = self.similarities(query)
        if hide is not None:
            similarity = similarity.masked_fill(hide, float("-inf"))
        top = similarity.topk(k or self.k, -1)
        logits = torch.zeros_like(top.values) if even else top.values / self.tau
        return torch.zeros_like(similarity).scatter(-1, top.indices, logits.softmax(-1))


def condition(alpha: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """(μ*, σ*²) of the mixture, by the law of total variance.

    μ* = Σ α_k μ_k,   σ*² = Σ α_k σ_k² + Σ α_k (μ_k − μ*)².   alpha [n, tasks], rest [tasks, size].
    """
    mu = alpha @ means
    between = alpha @ means.square() - mu.square()
    return mu, (alpha @ variances + between).clamp_min(0.0)


def choose_neighbours(
    embeddings: Tensor, wordings: Tensor, owner: Tensor, means: Tensor
) -> Neighbours:
    """k and τ that best predict each expert from the others, one task left out at a time.

    `wordings` [n_texts, width] with `owner` int64 [n_texts]; `means` [n_tasks, size].
    """
    hide = F.one_hot(owner, len(embeddings)).bool()
    best: tuple[float, Neighbours] | None = None
    for k in _GRID_K:
        for tau in _GRID_TAU:
            neighbours = Neighbours(embeddings, min(k, len(embeddings) - 1), tau)
            alpha = neighbours.weights(wordings, hide=hide)
            error = float((alpha @ means - means[owner]).square().sum(-1).mean())
            if best is None or error < best[0]:
                best = error, neighbours
    assert best is not None
    return best[1]
