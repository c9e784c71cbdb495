"""A matrix between the factors or before them, folded to factors of the same rank.

ΔW = s · B C A: B' = s · B C.   ΔW = s · B A (I − Vᵀ V): A' = A − (A Vᵀ) V   (Comp-LoRA).

LoRA-XS / LoRA-SB ``lora_R`` [r, r] (also ``default_lora_latent_mapping``), NLoRA ``lora_N``, LaMDA
``lora_S``; all trained on the clean base, or with ``lora_A0``/``lora_B0`` as what was subtracted.
Comp-LoRA ``comp_projector.weight`` [k, in], orthonormal rows: the principal directions kept clear.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loraplex_adapter_store.plan import Family

from .module_groups import ModuleGroup

__all__ = ["CORE_FAMILIES", "PROJECTOR", "fold_core", "fold_projector"]

PROJECTOR = "comp_projector.weight"
CORE_FAMILIES: Mapping[str, Family] = {  # the tensor of the core → whose it is
    "lora_R.weight": Family.LORA_SB,
    "lora_N.weight": Family.NLORA,
    "lora_S.weight": Family.LAMDA,
    "default_lora_latent_mapping.weight": Family.LORA_XS,
}


def fold_projector(group: ModuleGroup, a: Tensor) -> Tensor:
    """Returns A (I − Vᵀ V) if the module has a projector."""
    if PROJECTOR not in group:
        return a
    v = group.take(PROJECTOR, None, a.shape[1])
    return a - (a @ v.t()) @ v


def fold_core(group: ModuleGroup, b: Tensor, rank: int) -> Tensor:
    """Returns B C for every core the module has; y = B (C (A x)), C stored as a linear's weight."""
    for suffix in CORE_FAMILIES:
        if suffix in group:
            b = b @ group.take(suffix, rank, rank)
    return b
