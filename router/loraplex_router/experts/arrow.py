"""Arrow: routes tokens over a library of plain LoRAs without any training.

Each LoRA of a projection is represented by the input direction it amplifies most, the top right
singular vector of BA. A token goes to the LoRAs whose direction it is most aligned with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["arrow_prototypes", "top_right_singular_vector"]


def arrow_prototypes(factors: Sequence[tuple[Tensor, Tensor]], temperature: float = 1.0) -> Tensor:
    """Stacks one prototype per LoRA: float32 [n_experts, in_features], the gate of ``gate_arrow``.

    ``factors`` are pairs (b [out, rank], a [rank, in]); ranks may differ. Dividing by the
    temperature scales every |v·x| alike, which is softmax's temperature.
    """
    if not factors:
        raise ValueError("Arrow needs at least one LoRA, got none")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
    return torch.stack([top_right_singular_vector(b, a) for b, a in factors]) / temperature


def top_right_singular_vector(b: Tensor, a: Tensor) -> Tensor:
    """The unit vector v that maximises |B A v|, float32 [in_features]; exact, not iterated.

    BA is never formed. With Aᵀ = QR, BA = (B Rᵀ) Qᵀ, so v = Q u for the top right singular vector
    u of B Rᵀ, which the [rank, rank] matrix R BᵀB Rᵀ yields. The sign is fixed (largest component
    positive). A zero product has no direction and gives zeros: such a LoRA attracts no token.
    """
    q, r = torch.linalg.qr(a.double().T)  # [in, rank], [rank, rank]
    gram = r @ (b.double().T @ b.double()) @ r.T
    values, vectors = torch.linalg.eigh(gram)  # ascending
    if float(values[-1]) <= 0.0:
        return torch.zeros(a.shape[1], dtype=torch.float32)
    v: Tensor = q @ vectors[:, -1]
    return (v * torch.sign(v[v.abs().argmax()])).float()
