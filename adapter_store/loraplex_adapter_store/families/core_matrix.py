"""A matrix between the factors or before them, folded to factors of the same rank.

ΔW = s · B C A: B' = s · B C.   ΔW = s · B A (I − Vᵀ V): A' = A − (A Vᵀ) V   (Comp-LoRA).

LoRA-XS / LoRA-SB ``lora_R`` [r, r] (also ``default_lora_latent_mapping``), NLoRA ``lora_N``, LaMDA
``lora_S``; all trained on the clean base, or with ``lora_A0``/``lora_B0`` as what was subtracted.
Comp-LoRA ``comp_projector.weight`` [k, in], orthonormal rows: the principal directions kept clear.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .contract import ReadContext

__all__ = ["CORE_SUFFIXES", "PROJECTOR", "fold_core", "fold_projector"]

PROJECTOR = "comp_projector.weight"
CORE_SUFFIXES = (
    "lora_R.weight",
    "lora_N.weight",
    "lora_S.weight",
    "default_lora_latent_mapping.weight",
)


def fold_projector(context: ReadContext, parts: Mapping[str, str], a: Tensor) -> Tensor:
    """Returns A (I − Vᵀ V) if the module has a projector."""
    if PROJECTOR not in parts:
        return a
    v = context.ledger.take(parts[PROJECTOR], (None, a.shape[1]))
    return a - (a @ v.t()) @ v


def fold_core(context: ReadContext, parts: Mapping[str, str], b: Tensor, rank: int) -> Tensor:
    """Returns B C for every core the module has; y = B (C (A x)), C stored as a linear's weight."""
    for suffix in CORE_SUFFIXES:
        if suffix in parts:
            b = b @ context.ledger.take(parts[suffix], (rank, rank))
    return b
