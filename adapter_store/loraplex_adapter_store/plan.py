"""The runtime form every adapter folds into: all that the engine knows of an adapter.

    y = out_scale ⊙ (W (in_scale ⊙ x) + b + B A (in_scale ⊙ x) + shared(x)) + bias

Factors are float32 on the host with every training-time scale folded into B; the engine casts them
to its dtype when it places them on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

__all__ = [
    "AdapterPlan",
    "ExpertPlan",
    "Family",
    "ModulePlan",
    "PrefixPlan",
    "RoutingStrategy",
    "SharedBasis",
]


class Family(Enum):
    """How an adapter was trained."""

    LORA = "lora"
    DORA = "dora"
    ADALORA = "adalora"
    SORA = "sora"
    LORA_XS = "lora-xs"
    KASA = "kasa"
    LOLDU = "loldu"
    BLOCK_LORA = "block-lora"
    MIXLORA = "mixlora"
    MOLA = "mola"
    LORAMOE = "loramoe"
    VERA = "vera"
    RANDLORA = "randlora"
    LOFIT = "lofit"
    IA3 = "ia3"
    PREFIX = "prefix-tuning"
    PROMPT = "prompt-tuning"
    FULL = "full-delta"
    GENERATED = "generated"


class RoutingStrategy(Enum):
    """How a gate turns its logits into the weights of experts."""

    TOP_K = "mixlora"
    TOP_P = "mixlora-dynamic"
    SWITCH = "mixlora-switch"
    DENSE = "loramoe"


@dataclass(frozen=True, slots=True)
class SharedBasis:
    """Frozen bases shared by many adapters and this adapter's diagonals (VeRA, RandLoRA).

    ``apply`` semantics per family are documented in ``families/``; tensors are float32.
    """

    basis_digest: str  # identity of (a, b): adapters with equal digests share one copy
    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]
    rank_scale: Tensor  # [rank], or [rank, in_features] for RandLoRA's γ on the input
    out_scale: Tensor  # [out_features] or []; scales the delta only


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What one linear of the base becomes. Absent parts are None; at least one is present."""

    a: Tensor | None = None  # float32 [rank, in_features]
    b: Tensor | None = None  # float32 [out_features, rank], scale folded in
    out_scale: Tensor | None = None  # float32 [out_features]
    bias: Tensor | None = None  # float32 [out_features], added last
    in_scale: Tensor | None = None  # float32 [in_features]
    shared: SharedBasis | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Routed experts over one MLP block (MixLoRA) or over one projection (MoLA, LoRAMoE).

    The gate reads the block's input: ``p = softmax(gate @ h)`` in float32.
    """

    gate: Tensor  # float32 [n_experts, hidden_size]
    strategy: RoutingStrategy
    top_k: int
    top_p: float
    experts: tuple[Mapping[str, ModulePlan], ...]  # per expert: base module name → plan


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Virtual tokens that stand before the prompt."""

    keys: tuple[
        Tensor, ...
    ] = ()  # per layer [n_virtual, n_kv_heads, head_dim], post-RoPE as trained
    values: tuple[Tensor, ...] = ()
    embeddings: Tensor | None = None  # [n_virtual, hidden_size] for prompt tuning


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """One adapter, folded and checked against its base. Immutable and shared between threads."""

    digest: str  # sha256 of config + tensors, hex
    family: Family
    modules: Mapping[str, ModulePlan]  # base module name, as "model.layers.0.self_attn.q_proj"
    experts: Mapping[str, ExpertPlan] = field(default_factory=dict)  # block or projection name →
    prefix: PrefixPlan | None = None
    embedding_rows: Mapping[int, Tensor] = field(default_factory=dict)  # token id → row [hidden]
    dense: Mapping[str, Tensor] = field(default_factory=dict)  # module name → replacing weight
    chat_template: str | None = None  # the adapter's own, if it ships one
    n_bytes: int = 0  # true bytes of all float32 tensors above
