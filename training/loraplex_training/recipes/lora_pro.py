"""LoRA-Pro: Are Low-Rank Adapters Properly Optimized? (Wang et al. 2024, arXiv 2407.18242).

The gradients of A and B are replaced by those whose joint step on W is nearest to ∇W (theorem 2.1):

    g_A = (1/s²) (BᵀB)⁻¹ ∇A + X A
    g_B = (1/s²) (I − B (BᵀB)⁻¹ Bᵀ) ∇B (AAᵀ)⁻¹ − B X
    BᵀB X + X AAᵀ = −(1/s²) (BᵀB)⁻¹ ∇A Aᵀ                 (theorem 2.3: the changes are smallest)

so that s (B g_A + g_B A) = ∇W − (I − P_B) ∇W (I − P_A). Inverses are pseudo-inverses: B starts at
zero. Adam's moments are those of g_A and g_B; the paper keeps moments of the product, [out, in] a
linear, which is the memory of full fine-tuning.
"""

import torch
from torch import Tensor

from .recipe import Recipe, RecipeAdapter

_TINY = 1e-9  # of the largest eigenvalue; smaller ones count as zero


def _gradient(adapter: RecipeAdapter) -> None:
    for part in adapter.parts.values():
        a, b = part["A"], part["B"]
        if a.grad is None or b.grad is None:
            continue
        a.grad, b.grad = (
            g.to(a.dtype) for g in adjusted(a.detach(), b.detach(), a.grad, b.grad, adapter.scale)
        )


def adjusted(a: Tensor, b: Tensor, ga: Tensor, gb: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return g_A and g_B in float64."""
    a, b, ga, gb = a.double(), b.double(), ga.double() / s**2, gb.double() / s**2
    p, left = torch.linalg.eigh(b.t() @ b)
    q, right = torch.linalg.eigh(a @ a.t())
    inverse_b = left * _inverse(p) @ left.t()
    inverse_a = right * _inverse(q) @ right.t()
    step = inverse_b @ ga
    sums = p.clamp_min(0)[:, None] + q.clamp_min(0)[None, :]
    x = left @ (-(left.t() @ step @ a.t() @ right) / sums.clamp_min(1e-30)) @ right.t()
    rest = gb - b @ (inverse_b @ (b.t() @ gb))
    return step + x @ a, rest @ inverse_a - b @ x


def _inverse(eigenvalues: Tensor) -> Tensor:
    floor = _TINY * eigenvalues.max()
    return torch.where(eigenvalues > floor, 1 / eigenvalues.clamp_min(1e-30), 0.0)


RECIPE = Recipe(gradient=_gradient)
