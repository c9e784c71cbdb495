"""Flexora: Flexible Low-Rank Adaptation for Large Language Models (Wei et al. 2024, arXiv
2408.10774).

A weight α_ℓ for each layer scales its updates while layers are chosen; then the layers with the
larger weights are trained from their start, and the others are not adapted:

    ΔW = s · α̂_ℓ B A,   α̂ = n_layers · softmax(α),   kept: α̂_ℓ > 1

The paper learns α on validation data by unrolled differentiation. Here every second of the first
40 steps moves α alone, by the gradient at the current A and B (one unrolled step of length zero).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_training.engine.adapter import Adam, layer_of

from .recipe import Part, Recipe, RecipeAdapter, Start

_SEARCH_STEPS = 40
_ALPHA_LR = 0.05


def _start(start: Start) -> Mapping[str, Part]:
    parts = start.plain()
    layers = sorted({layer_of(name) or 0 for name in parts})
    alpha = torch.zeros(len(layers))
    for name, part in parts.items():
        device = part["A"].device
        part.frozen |= {
            "A0": part["A"].clone(),
            "at": torch.tensor(layers.index(layer_of(name) or 0), device=device),
            "alpha": alpha.to(device).clone(),
            "gate": torch.ones((), device=device),
        }
    return parts


def _factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return part["A"], part["B"] * part["gate"]


def _optimiser(adapter: RecipeAdapter, adam: Adam) -> float:
    parts = list(adapter.parts.values())
    step = adapter.n_steps
    if step < _SEARCH_STEPS and step % 2 == 1:
        norm = _move_alpha(adapter, parts)
    else:
        norm = adapter.adam_step(adam)
    if adapter.n_steps == _SEARCH_STEPS:
        for part in parts:
            with torch.no_grad():
                part.frozen["gate"] = (part["gate"] > 1).float()
                part["A"].copy_(part["A0"])
                part["B"].zero_()
        adapter.moments.clear()
    return norm


def _move_alpha(adapter: RecipeAdapter, parts: list[Part]) -> float:
    """Move α against dL/dα, with ∂L/∂α̂_ℓ = ⟨∇B, B⟩ / α̂_ℓ summed over the layer's linears."""
    alpha = parts[0]["alpha"].clone().requires_grad_()
    gates = len(alpha) * alpha.softmax(0)
    slopes = torch.zeros_like(alpha)
    for part in parts:
        b = part["B"]
        if b.grad is not None:
            slopes[part["at"]] += (b.grad * b.detach()).sum() / part["gate"]
    (slope,) = torch.autograd.grad(gates, alpha, slopes)
    for parameter in adapter.parameters.values():
        parameter.grad = None
    adapter.n_steps += 1
    with torch.no_grad():
        moved = alpha - _ALPHA_LR * slope / slope.norm().clamp_min(1e-30)
        gates = len(alpha) * moved.softmax(0)
        for part in parts:
            part.frozen["alpha"] = moved.clone()
            part.frozen["gate"] = gates[part["at"]].clone()
    return float(slope.norm())


RECIPE = Recipe(_start, _factors, optimiser=_optimiser, prunes=True)
