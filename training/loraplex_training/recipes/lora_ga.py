"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al. 2024, arXiv 2407.05000).

    ∇W = U S Vᵀ on a sample;  A₀ = c V[:r]ᵀ,  B₀ = c U[:, r:2r],  c = out^¼ / √γ,  γ = 16
    trained: W − s B₀ A₀ + s B A,  so that the first step is close to that of full fine-tuning

These are the paper's defaults: direction "ArB2r" and scale "stable". PEFT multiplies B₀ by the
singular values as well, and leaves A₀ unscaled. The saved LoRA has rank 2r: [A; A₀], [B, −B₀].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_training.errors import TrainingError

from .recipe import Part, Recipe, Start

_GAMMA = 16.0


def _start(start: Start) -> Mapping[str, Part]:
    parts, rank = {}, start.shape.rank
    for name, gradient in start.gradients():
        if 2 * rank > min(gradient.shape):
            raise TrainingError(f"LoRA-GA needs a rank of at most {min(gradient.shape) // 2}")
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        scale = gradient.shape[0] ** 0.25 / _GAMMA**0.5
        parts[name] = with_residual(scale * vh[:rank], scale * u[:, rank : 2 * rank])
    return parts


def with_residual(a: Tensor, b: Tensor) -> Part:
    """Return a part that trains from A and B on a base without s·B A."""
    return Part({"A": a, "B": b}, {"A0": a.clone(), "B0": b.clone()})


def residual_factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return torch.cat([part["A"], part["A0"]]), torch.cat([part["B"], -part["B0"]], dim=1)


RECIPE = Recipe(_start, residual_factors)
