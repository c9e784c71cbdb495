"""The one table of families: peft_type → how its files are read, or why they are not."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    abmll,
    base_spectrum,
    block_lora,
    delora,
    deltas,
    from_weight,
    full_delta,
    gralora,
    loldu,
    lora,
    mixlora,
    prompts,
    ragged,
    reflections,
    routed_projections,
    shared_bases,
    trainable_tokens,
    vector_bank,
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
    "MIXLORA": mixlora.read,
    "MOLA": routed_projections.read_mola,
    "LORAMOE": routed_projections.read_loramoe,
    "TRAINABLE_TOKENS": trainable_tokens.read,
    "ABMLL": abmll.read,
    "FULL": full_delta.read,
    "HRA": reflections.read,
    "DELORA": delora.read,
    "GRALORA": gralora.read,
    "VBLORA": vector_bank.read_vblora,
    "UNILORA": vector_bank.read_unilora,
    "PVERA": shared_bases.read_pvera,
    "PSOFT": base_spectrum.read_psoft,
    "OSF": base_spectrum.read_osf,
    "DEFT": from_weight.read_deft,
    "PEANUT": from_weight.read_peanut,
    "CARTRIDGE": prompts.read_prefix,
    "CPT": prompts.read_prompt,
    "MULTITASK_PROMPT_TUNING": prompts.read_multitask_prompt,
}

_MULTIPLIES = "it multiplies the base weight by a full-rank matrix"
_FULL_RANK = "its delta has full rank and no shared basis"

# Recognised and refused: no silent approximation.
UNSUPPORTED: Mapping[str, str] = {
    "OFT": _MULTIPLIES,
    "BOFT": _MULTIPLIES,
    "ROAD": _MULTIPLIES,
    "HIRA": "its delta is the base weight times a low-rank mask, entry by entry",
    "BONE": "it was replaced by MiSS; convert it with PEFT",
    "LOKR": "its delta is a Kronecker product of full rank",
    "FOURIERFT": _FULL_RANK,
    "WAVEFT": _FULL_RANK,
    "FROD": _FULL_RANK,
    "C3A": "its delta is a block-circulant convolution of full rank",
    "SHIRA": "its delta is sparse, not low-rank",
    "ADAMSS": "the file lacks which rows belong to which subspace; PEFT clusters the base anew",
    "LILY": "its update is a mean over all tokens of a batch: an answer would depend on others",
    "SHADOW": "it runs a second network beside the layers, with a state of its own",
    "XLORA": "it routes between other adapters with a second forward pass",
    "POLY": "it routes between modules by a task id that requests do not carry",
    "ADAPTION_PROMPT": "it adds gated attention to trained prompts inside each layer",
    "LN_TUNING": "only norms are trained; save a full checkpoint and add that",
}
