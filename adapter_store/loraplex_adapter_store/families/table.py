"""The table of families: peft_type → reader, or the reason why the type is refused."""

from collections.abc import Mapping

from . import rotations, spectra
from .beside_linears import prompts, replaced
from .contract import FamilyReader
from .from_base import base_spectrum, from_weight, full_delta, masks
from .low_rank import blocks, deltas, lora
from .routed import mixlora, routed_projections
from .shared_vectors import shared_bases, vectors

FAMILIES: Mapping[str, FamilyReader] = {
    "LORA": lora.read,
    "LORAGA": lora.read_loraga,
    "ADALORA": deltas.read_adalora,
    "SORA": deltas.read_sora,
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
    "LOLDU": from_weight.read_loldu,
    "BLOCK_LORA": blocks.read_block_lora,
    "MIXLORA": mixlora.read,
    "MOLA": routed_projections.read_mola,
    "LORAMOE": routed_projections.read_loramoe,
    "TRAINABLE_TOKENS": replaced.read_trainable_tokens,
    "ABMLL": deltas.read_abmll,
    "FULL": full_delta.read,
    "HRA": rotations.read_hra,
    "DELORA": deltas.read_delora,
    "GRALORA": blocks.read_gralora,
    "VBLORA": vectors.read_vblora,
    "UNILORA": vectors.read_unilora,
    "PVERA": shared_bases.read_pvera,
    "PSOFT": base_spectrum.read_psoft,
    "OSF": base_spectrum.read_osf,
    "DEFT": from_weight.read_deft,
    "PEANUT": from_weight.read_peanut,
    "LOKR": deltas.read_lokr,
    "OFT": rotations.read_oft,
    "BOFT": rotations.read_boft,
    "ROAD": rotations.read_road,
    "FOURIERFT": spectra.read_fourierft,
    "C3A": spectra.read_c3a,
    "WAVEFT": spectra.read_waveft,
    "SHIRA": spectra.read_shira,
    "SUPERTUNING": spectra.read_supertuning,
    "HIRA": masks.read_hira,
    "GLORA": masks.read_glora,
    "FROD": from_weight.read_frod,
    "LN_TUNING": replaced.read_layer_norms,
    "CARTRIDGE": prompts.read_prefix,
    "CPT": prompts.read_prompt,
    "MULTITASK_PROMPT_TUNING": prompts.read_multitask_prompt,
}


# Types that are known and refused.
UNSUPPORTED: Mapping[str, str] = {
    "BONE": "it was replaced by MiSS; convert it with PEFT",
    "ADAMSS": "the file lacks which rows belong to which subspace; PEFT clusters the base anew",
    "LILY": "its update is a mean over all tokens of a batch: an answer would depend on others",
    "SHADOW": "it runs a second network beside the layers, with a state of its own",
    "XLORA": "it routes between other adapters with a second forward pass",
    "POLY": "it routes between modules by a task id that requests do not carry",
    "ADAPTION_PROMPT": "it adds gated attention to trained prompts inside each layer",
}
