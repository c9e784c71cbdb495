"""Orthogonal matrices from what methods train of them (OFT, BOFT, PSOFT)."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import MalformedFile

__all__ = ["cayley", "cayley_series", "skew_symmetric"]

_MAX_TERMS = 64


def skew_symmetric(entries: Tensor, size: int) -> Tensor:
    """[n, size·(size − 1)/2] above the diagonal, row by row → [n, size, size]."""
    rows, columns = torch.triu_indices(size, size, 1)
    upper = entries.new_zeros(entries.shape[0], size, size)
    upper[:, rows, columns] = entries
    return upper - upper.transpose(1, 2)


def cayley(skew: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹ of each skew-symmetric Q [n, k, k]: orthogonal."""
    eye = torch.eye(skew.shape[-1])
    solved: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return solved


def cayley_series(skew: Tensor, n_terms: int) -> Tensor:
    """PEFT's series of n terms, I + 2 Q + … + 2 Qⁿ⁻² + Qⁿ⁻¹; it begins with I + 2 Q at two."""
    if not 1 <= n_terms <= _MAX_TERMS:
        raise MalformedFile(
            f"adapter_config.json: num_cayley_neumann_terms is {n_terms}, 1 to {_MAX_TERMS} are "
            "possible"
        )
    total = torch.eye(skew.shape[-1]).expand_as(skew)
    if n_terms > 1:
        total = total + 2 * skew
    if n_terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, n_terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total
