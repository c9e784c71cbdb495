"""How large an update is and what it does to a spectrum, from its factors, without a dense ΔW."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base_spec import BaseSpec
from .plan import ModulePlan

__all__ = [
    "Intruders",
    "delta_ratio",
    "factor_norm",
    "find_intruders",
    "intruders_among",
    "singular_values",
]


class Intruders(NamedTuple):
    """Intruder dimensions of one module: top singular vectors of W + ΔW unlike any of W."""

    n_intruders: int  # of the first k tuned left singular vectors, best cosine < epsilon
    best_cosines: tuple[float, ...]  # per tuned vector, max |cosine| over the base's vectors


def factor_norm(a: Tensor, b: Tensor) -> float:
    """‖B A‖_F = √tr((BᵀB)(A Aᵀ)), in float64."""
    a64, b64 = a.double(), b.double()
    square = ((b64.t() @ b64) * (a64 @ a64.t())).sum()
    return float(square.clamp_min(0).sqrt())


def delta_ratio(base: BaseSpec, module: str, plan: ModulePlan) -> float | None:
    """‖ΔW‖/‖W‖ of the additive part, None if the module has none."""
    if plan.a is None or plan.b is None:
        return None
    size = base.norms.get(module, 0.0)
    return factor_norm(plan.a, plan.b) / size if size else None


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Of B A, descending [rank], through two thin QRs and an r×r SVD."""
    _, left = torch.linalg.qr(b.double())
    _, right = torch.linalg.qr(a.double().t())
    values: Tensor = torch.linalg.svdvals(left @ right.t())
    return values.float()


def find_intruders(
    weight: Tensor, a: Tensor, b: Tensor, *, k: int = 10, epsilon: float = 0.5
) -> Intruders:
    """The released test of "LoRA vs Full Fine-tuning": left vectors, first k, strict < epsilon."""
    u_base = torch.linalg.svd(weight, full_matrices=False)[0]
    return intruders_among(u_base, weight + b @ a, k=k, epsilon=epsilon)


def intruders_among(
    u_base: Tensor, tuned: Tensor, *, k: int = 10, epsilon: float = 0.5
) -> Intruders:
    """As ``find_intruders``, where the left singular vectors of the base are known."""
    u_tuned = torch.linalg.svd(tuned, full_matrices=False)[0][:, :k]
    best = (u_tuned.t() @ u_base).abs().amax(dim=1)
    return Intruders(int((best < epsilon).sum()), tuple(best.tolist()))
