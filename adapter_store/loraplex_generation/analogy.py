"""Additive analogy: experts as sums of factors, so that French-JSON = French + JSON − the mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_generation.zoo.tasks import Task

from .factors import Factors

__all__ = ["analogy_matrix"]

_PENALTY = 0.05


def analogy_matrix(factors: Factors, tasks: Sequence[Task]) -> Tensor:
    """[factors.size, n_tasks]: times a point c, the weights of the experts whose sum it stands for.

    Ridge regression of the experts on their factors, written in the experts.
    """
    design = torch.stack([factors.exact_point(task) for task in tasks]).double()
    gram = design.T @ design + _PENALTY * torch.eye(factors.size)
    matrix: Tensor = torch.linalg.solve(gram, design.T).float()
    return matrix
