"""BA-LoRA: Bias-Alleviating Low-Rank Adaptation (Chang et al. 2024, arXiv 2408.04556).

PiSSA's start, A₀ = √(S_r/s) V_rᵀ and B₀ = U_r √(S_r/s) of W = U S Vᵀ on the base without s B₀ A₀,
and three terms of the loss for generation (the authors' numbers), on the answers' logits Z:

    λ₁ KL(p_base ‖ p)  −  λ₂ H(p)  −  λ₃ Σ_{i≤k} σ_i(Z) / Σ_i σ_i(Z)
    λ₁ = 10⁻⁴, λ₂ = 3·10⁻⁴, λ₃ = 10⁻⁴, k = 3;  KL and H are means over positions

At most 32 answer positions of a batch are used, because Z has a row of the vocabulary for each.
The saved LoRA has rank 2r.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .lora_ga import residual_factors, with_residual
from .recipe import Part, Recipe, Start

_CONSISTENCY, _DIVERSITY, _SPECTRUM, _TOP = 1e-4, 3e-4, 1e-4, 3


def _start(start: Start) -> Mapping[str, Part]:
    parts, rank = {}, start.shape.rank
    for name in start.linears:
        u, sigma, vh = torch.linalg.svd(start.weight(name), full_matrices=False)
        root = (sigma[:rank] / start.shape.scale).sqrt()
        parts[name] = with_residual(root[:, None] * vh[:rank], u[:, :rank] * root)
    return parts


def penalty(logits: Tensor, base_logits: Tensor) -> Tensor:
    """Return the three terms for float32 [n, vocabulary]."""
    logp, base_logp = logits.log_softmax(-1), base_logits.log_softmax(-1)
    kl = (base_logp.exp() * (base_logp - logp)).sum(-1).mean()
    entropy = -(logp.exp() * logp).sum(-1).mean()
    values = torch.linalg.svdvals(logits)
    share = values[:_TOP].sum() / values.sum().clamp_min(1e-10)
    terms: Tensor = _CONSISTENCY * kl - _DIVERSITY * entropy - _SPECTRUM * share
    return terms


RECIPE = Recipe(_start, residual_factors, penalty=penalty)
