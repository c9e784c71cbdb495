"""LoRAs trained on a modified base: the matrix S that training subtracted from W, as factors.

    trained:  (W − S_b S_a) x + s·B A x        served on W:  A' = [A; S_a],  B' = [s·B, −S_b]

PiSSA    S = U_r Σ_r V_rᵀ           top r singular triplets of W
OLoRA    S = s · Q[:, :r] R[:r]     from the QR decomposition of W
KaSA     S = U_k Σ_k V_kᵀ           the r smallest singular triplets of W (PEFT, with kasa_config)
                                    or all but the in − r largest (the authors' files)
NLoRA    S = s · W[:, :r] N₀ W[:r]   N₀ = pinv(W[:r, :r]); only with base_residual, see below
others   S = s · B₀ A₀              needs the initial factors (LoRA-GA, CorDA, randomised PiSSA)

PiSSA, OLoRA and KaSA are recomputed from the base, as PEFT does at load; their products do not
depend on the signs that a decomposition picks. The others need ``lora_A0``/``lora_B0``. NLoRA's
paper replaces the base, its released code does not: ``"base_residual": true`` says that it did.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import UnsupportedAdapter
from loraplex_adapter_store.files.adapter_config import AdapterConfig

RECOMPUTED = ("pissa", "olora")  # values of init_lora_weights that the base alone repeats
_UNTOUCHED = ("gaussian", "eva", "orthogonal", "mica")
_NEED_FACTORS = {
    "lora_ga": "LoRA-GA takes them from gradients",
    "corda": "CorDA takes them from activations",
    "loftq": "LoftQ also replaced the base by a quantised one",
}


class InitRule(NamedTuple):
    """The change of the base by ``init_lora_weights``. ``name`` is "" if there is none."""

    name: str  # "", "pissa", "olora", "nlora" or one that needs the initial factors
    why_factors: str  # non-empty: the initial factors must be in the file


class Subtracted(NamedTuple):
    """S = B A."""

    a: Tensor  # [k, in]
    b: Tensor  # [out, k]


def init_rule(config: AdapterConfig) -> InitRule:
    """Return the rule of the config. Raises UnsupportedAdapter for an unknown initialisation."""
    value = config.get("init_lora_weights")
    if value is None or isinstance(value, bool):
        return InitRule("", "")
    name = str(value).lower()
    if name in _UNTOUCHED:
        return InitRule("", "")
    if name in ("n_lora", "s_lora"):
        return InitRule("nlora" if config.flag("base_residual") else "", "")
    if name in RECOMPUTED:
        return InitRule(name, "")
    if name.startswith("pissa_niter_"):
        return InitRule("pissa", "its SVD is randomised and cannot be repeated")
    for key, why in _NEED_FACTORS.items():
        if name.startswith(key):
            return InitRule(key, why)
    raise UnsupportedAdapter(
        f"init_lora_weights={value!r} is not known: it may have modified the base in training"
    )


def subtracted(rule: str, weight: Tensor, rank: int, scale: float) -> Subtracted:
    """Return the factors that ``rule`` subtracted from ``weight`` [out, in] at initialisation."""
    if rule == "pissa":
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        return Subtracted(vh[:rank].clone(), u[:, :rank] * sigma[:rank])
    if rule in ("kasa", "kasa-authors"):
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        n_kept = (sigma.numel() if rule == "kasa" else weight.shape[1]) - rank
        first = min(max(n_kept, 0), sigma.numel())
        return Subtracted(vh[first:].clone(), u[:, first:] * sigma[first:])
    if rule == "olora":
        q, r = torch.linalg.qr(weight)
        return Subtracted(r[:rank].clone(), scale * q[:, :rank])
    if rule == "nlora":
        core = torch.linalg.pinv(weight[:rank, :rank].double()).float()
        return Subtracted(weight[:rank].clone(), scale * weight[:, :rank] @ core)
    raise AssertionError(f"no rule {rule!r}")
