"""The one table of families: peft_type → how its files are read, or why they are not."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    abmll,
    block_lora,
    deltas,
    full_delta,
    loldu,
    lora,
    mixlora,
    prompts,
    ragged,
    shared_bases,
    trainable_tokens,
    vectors,
)
from .contract import FamilyReader

__all__ = ["FAMILIES", "UNSUPPORTED"]

FAMILIES: Mapping[str, FamilyReader] = {
    "LORA": lora.read,
    "ADALORA": ragged.read_adalora,
    "SORA": ragged.read_sora,
    "VERA": shared_bases.read_vera,
    "RANDLORA": shared_bases.read_randlora,
    "IA3": vectors.read_ia3,
    "BEFT": vectors.read_beft,
    "LOFIT": vectors.read_lofit,
    "PREFIX_TUNING": prompts.read_prefix,
    "PROMPT_TUNING": prompts.read_prompt,
    "P_TUNING": prompts.read_prompt,
    "MISS": deltas.read_miss,
    "TINYLORA": deltas.read_tinylora,
    "LOHA": deltas.read_loha,
    "LOLDU": loldu.read,
    "BLOCK_LORA": block_lora.read,
    "MIXLORA": mixlora.read_mixlora,
    "MOLA": mixlora.read_mola,
    "LORAMOE": mixlora.read_loramoe,
    "TRAINABLE_TOKENS": trainable_tokens.read,
    "ABMLL": abmll.read,
    "FULL": full_delta.read,
}

_MULTIPLIES = "it multiplies the base weight by a full-rank matrix"
_FULL_RANK = "its delta has full rank and no shared basis"

# Recognised and refused: no silent approximation.
UNSUPPORTED: Mapping[str, str] = {
    "OFT": _MULTIPLIES,
    "BOFT": _MULTIPLIES,
    "HRA": _MULTIPLIES,
    "ROAD": _MULTIPLIES,
    "PSOFT": _MULTIPLIES,
    "HIRA": "its delta is the base weight times a low-rank mask, entry by entry",
    "BONE": "it was replaced by MiSS; convert it with PEFT",
    "LOKR": "its delta is a Kronecker product of full rank",
    "FOURIERFT": _FULL_RANK,
    "WAVEFT": _FULL_RANK,
    "FROD": _FULL_RANK,
    "C3A": "its delta is a block-circulant convolution of full rank",
    "SHIRA": "its delta is sparse, not low-rank",
    "DELORA": "it normalises factors against the base; convert it to LoRA with PEFT",
    "GRALORA": "it cuts the weight into tiles; convert it to LoRA with PEFT",
    "VBLORA": "its vector bank is selected by logits; convert it to LoRA with PEFT",
    "XLORA": "it routes between other adapters with a second forward pass",
    "POLY": "it routes between modules by a task id that requests do not carry",
    "MULTITASK_PROMPT_TUNING": "it needs a task id that requests do not carry",
    "ADAPTION_PROMPT": "it adds gated attention to trained prompts inside each layer",
    "LN_TUNING": "only norms are trained; save a full checkpoint and add that",
    "CPT": "it adds context prompts with a loss-weighted projection",
    "OSF": "it rewrites the whole weight; save a full checkpoint and add that",
}
