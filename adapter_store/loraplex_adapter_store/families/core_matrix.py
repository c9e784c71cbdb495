"""A core matrix between the factors: ΔW = s · B C A, folded to B' = s · B C of the same rank.

LoRA-XS / LoRA-SB ``lora_R`` [r, r] (also ``default_lora_latent_mapping``), NLoRA ``lora_N``, LaMDA
``lora_S``; all trained on the clean base, or with ``lora_A0``/``lora_B0`` as what was subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .contract import ReadContext

__all__ = ["CORE_SUFFIXES", "fold_core"]

CORE_SUFFIXES = (
    "lora_R.weight",
    "lora_N.weight",
    "lora_S.weight",
    "default_lora_latent_mapping.weight",
)


def fold_core(context: ReadContext, parts: Mapping[str, str], b: Tensor, rank: int) -> Tensor:
    """Returns B C for every core the module has; y = B (C (A x)), C stored as a linear's weight."""
    for suffix in CORE_SUFFIXES:
        if suffix in parts:
            b = b @ context.ledger.take(parts[suffix], (rank, rank))
    return b
