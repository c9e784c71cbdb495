"""Recipes that train an r × r core between frozen factors: ΔW = s B R A, 27 to 90 times fewer
numbers than LoRA.

LoRA-SB     Initialization using Update Approximation is a Silver Bullet (Ponkshe et al. 2024,
            arXiv 2411.19557): A, B and R start as the best rank-r form of the first step of full
            fine-tuning, −η sign(∇W) = U S Vᵀ:  B = U_r, A = V_rᵀ, R = S_r / s. The training starts
            one step ahead. The authors take η = lr / warm-up steps, 3·10⁻⁶ in their scripts.
IntTune     NLoRA: Nyström-Initiated Low-Rank Adaptation (Guo et al. 2025, arXiv 2502.14482):
            A = W[:r], B = W[:, :r], and N starts as the Nyström core that the base is freed of, so
            ΔW = s B (N − N₀) A. R = N − N₀ starts at zero.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .recipe import Part, Recipe, Start

_ETA = 3e-6


def _lora_sb(start: Start) -> Mapping[str, Part]:
    parts, rank = {}, start.shape.rank
    for name, gradient in start.gradients():
        u, sigma, vh = torch.linalg.svd(-_ETA * gradient.sign(), full_matrices=False)
        core = torch.diag(sigma[:rank]) / start.shape.scale
        parts[name] = Part({"R": core}, {"A": vh[:rank], "B": u[:, :rank]})
    return parts


def _inttune(start: Start) -> Mapping[str, Part]:
    parts, rank = {}, start.shape.rank
    for name in start.linears:
        weight = start.weight(name)
        factors = {"A": weight[:rank].clone(), "B": weight[:, :rank].clone()}
        parts[name] = Part({"R": weight.new_zeros(rank, rank)}, factors)
    return parts


def _factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return part["A"], part["B"] @ part["R"]


LORA_SB = Recipe(_lora_sb, _factors)
INTTUNE = Recipe(_inttune, _factors)
