"""GLAD: Generalizable Tuning with Regularised Gradients (Peng et al. 2025, arXiv 2507.13089).

A gradient that also lowers its own norm nearby, so that training ends where the loss is flat:

    g = (1 − α) ∇L(θ) + α ∇L(θ + ρ ∇L(θ) / ‖∇L(θ)‖),   α = 0.5, ρ = 0.05

This is the gradient norm penalty of Zhao et al. 2022 (arXiv 2202.03599). The paper's abstract names
a regularised gradient for stable regions; its formula and numbers could not be read. A step costs
two forwards and backwards.
"""

import torch

from .recipe import Recipe, RecipeAdapter

_ALPHA, _RHO = 0.5, 0.05


def _gradient(adapter: RecipeAdapter) -> None:
    tensors = [t for t in adapter.parameters.values() if t.grad is not None]
    here = [t.grad.clone() for t in tensors if t.grad is not None]
    norm = torch.stack([g.norm() for g in here]).norm() if here else torch.zeros(())
    if not float(norm) > 0:
        return
    places = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for tensor, g in zip(tensors, here, strict=True):
            tensor.add_(g, alpha=_RHO / float(norm))
            tensor.grad = None
    adapter.repeat()
    with torch.no_grad():
        for tensor, place, g in zip(tensors, places, here, strict=True):
            tensor.copy_(place)
            there = tensor.grad if tensor.grad is not None else torch.zeros_like(g)
            tensor.grad = (1 - _ALPHA) * g + _ALPHA * there


RECIPE = Recipe(gradient=_gradient, repeats=True)
