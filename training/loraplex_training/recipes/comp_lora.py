"""Comp-LoRA: Complementary Subspace Low-Rank Adaptation (Wang et al. 2025, arXiv 2501.15040).

The update leaves the principal directions of the base alone, which hold what it knew before:

    ΔW = s B A (I − V Vᵀ),   V: the first r right singular vectors of W

The paper adapts CLIP. How many directions it protects could not be read; here as many as the rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .recipe import Part, Recipe, Start


def _start(start: Start) -> Mapping[str, Part]:
    parts = start.plain()
    for name, part in parts.items():
        vh = torch.linalg.svd(start.weight(name), full_matrices=False)[2]
        part.frozen["V"] = vh[: start.shape.rank].clone()
    return parts


def _factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    a, v = part["A"], part["V"]
    return a - (a @ v.t()) @ v, part["B"]


RECIPE = Recipe(_start, _factors)
