"""LoRA-GGPO: Gradient-Guided Perturbation Optimization (Chang et al. 2025, arXiv 2502.14538).

Each step computes the gradient at randomly perturbed weights, so that training ends where the loss
is flat. The noise of a row of W follows the norms of the weight and of its gradient:

    W + s B A + E,   E_i ~ N(0, σ_i² I / in),   σ_i = ρ ‖W_i‖ · ‖∇B_i‖ / max_j ‖∇B_j‖,   ρ = 0.05

The abstract says that gradient and weight norms guide the noise. The exact formula could not be
read; the form above is that of Flat-LoRA (Li et al. 2024) with the gradient's norm. Here E has rank
r and is drawn as two more blocks of the factors, anew for each step, which are not saved.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_training.engine.adapter import Adam

from .recipe import Part, Recipe, RecipeAdapter, Start

_RHO = 0.05


def _start(start: Start) -> Mapping[str, Part]:
    parts = start.plain()
    for name, part in parts.items():
        part.frozen["rows"] = start.weight(name).norm(dim=1)
        part.frozen["noise_a"] = torch.zeros_like(part["A"])
        part.frozen["noise_b"] = torch.zeros_like(part["B"])
    return parts


def _factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return torch.cat([part["A"], part["noise_a"]]), torch.cat([part["B"], part["noise_b"]], dim=1)


def _served(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return part["A"], part["B"]


def _optimiser(adapter: RecipeAdapter, adam: Adam) -> float:
    lengths = {
        name: part["B"].grad.norm(dim=1)
        for name, part in adapter.parts.items()
        if part["B"].grad is not None
    }
    norm = adapter.adam_step(adam)
    random = torch.Generator().manual_seed(adapter.n_steps)
    for name, length in lengths.items():
        part = adapter.parts[name]
        rank, n_in = part["A"].shape
        sigma = _RHO * part["rows"] * length / length.max().clamp_min(1e-30)
        a = torch.randn(rank, n_in, generator=random) / (rank * n_in) ** 0.5
        b = torch.randn(len(sigma), rank, generator=random)
        part.frozen["noise_a"] = a.to(sigma.device)
        part.frozen["noise_b"] = sigma[:, None] * b.to(sigma.device) / adapter.scale
    return norm


RECIPE = Recipe(_start, _factors, optimiser=_optimiser, served=_served)
