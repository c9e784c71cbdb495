"""SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models (Ding et al. 2023, arXiv
2311.11696).

A gate g between the factors, ΔW = s B diag(g) A, which a proximal step drives to zero:

    g ← T(g − step),   T(x) = sign(x) · max(|x| − lr λ, 0)

g starts normal; λ is 1 here. The authors' scripts take a constant threshold, 10⁻³ at lr 10⁻³ to
begin with. Ranks whose gate is zero at the end are not saved, so modules have ranks of their own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_training.engine.adapter import Adam

from .recipe import Part, Recipe, RecipeAdapter, Start

_LAMBDA = 1.0


def _start(start: Start) -> Mapping[str, Part]:
    random = torch.Generator().manual_seed(start.seed)
    parts = start.plain()
    for part in parts.values():
        gate = torch.randn(start.shape.rank, generator=random)
        part.trained["gate"] = gate.to(part["A"].device)
    return parts


def _factors(part: Part, scale: float) -> tuple[Tensor, Tensor]:
    return part["A"], part["B"] * part["gate"]


def _optimiser(adapter: RecipeAdapter, adam: Adam) -> float:
    norm = adapter.adam_step(adam)
    for part in adapter.parts.values():
        gate = part["gate"].data
        gate.copy_(gate.sign() * (gate.abs() - adam.lr * _LAMBDA).clamp_min(0))
    return norm


RECIPE = Recipe(_start, _factors, optimiser=_optimiser, prunes=True)
