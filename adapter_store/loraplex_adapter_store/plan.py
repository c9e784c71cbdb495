"""The plan that every adapter folds into. The engine has no other data of an adapter.

    z = input_operator(in_scale ⊙ x)
    y = out_scale ⊙ output_operator(W z + b + B A z + shared(z) + delta_operator(z)) + bias

For an embedding x is one-hot: in_features is the vocabulary, and A x is a column of A. A factor of
the base on its embeddings (Gemma) is applied after all of this.

Factors are float32 on the host with every training-time scale folded into B. The engine packs the
factors once in its dtype and layout. The host tier then keeps that form and a plan without factors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from typing import Protocol

import torch
from torch import Tensor

from .operators.contract import Delta, Operator, RowMap, tensors_of
from .report import JsonValue


class Family(StrEnum):
    """The training method of an adapter."""

    LORA = "lora"
    DORA = "dora"
    ADALORA = "adalora"
    SORA = "sora"
    LORA_XS = "lora-xs"
    NLORA = "nlora"
    LAMDA = "lamda"
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
    TOKENS = "trainable-tokens"
    BEFT = "beft"
    MISS = "miss"
    TINYLORA = "tinylora"
    LOHA = "loha"
    ABMLL = "abmll"
    HRA = "hra"
    DELORA = "delora"
    GRALORA = "gralora"
    VBLORA = "vblora"
    UNILORA = "unilora"
    PVERA = "pvera"
    PSOFT = "psoft"
    OSF = "osf"
    GLORA = "glora"
    LOKR = "lokr"
    OFT = "oft"
    BOFT = "boft"
    ROAD = "road"
    FOURIERFT = "fourierft"
    WAVEFT = "waveft"
    C3A = "c3a"
    SHIRA = "shira"
    SUPERTUNING = "supertuning"
    HIRA = "hira"
    FROD = "frod"
    LN_TUNING = "ln-tuning"
    DEFT = "deft"
    PEANUT = "peanut"
    GENERATED = "generated"


class RoutingStrategy(Enum):
    """The function from a gate's logits to the weights of experts."""

    TOP_K = "mixlora"
    TOP_P = "mixlora-dynamic"
    SWITCH = "mixlora-switch"
    DENSE = "loramoe"
    ARROW = "arrow"  # |gate @ x| instead of logits; the gate comes from the experts themselves


class HeadTask(StrEnum):
    """The thing that a classifier labels, in PEFT's words."""

    SEQ_CLS = "SEQ_CLS"  # a text, by its last token
    TOKEN_CLS = "TOKEN_CLS"  # each token  # nosec B105


class Activation(Enum):
    """The function from the logits of a head to its answer."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


class PoolingMode(Enum):
    """The pooling of hidden states into one vector, in sentence-transformers' words."""

    CLS = "cls"
    LAST = "lasttoken"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"  # the sum, divided by the root of the length
    WEIGHTED_MEAN = "weightedmean"  # by position, from 1
    MAX = "max"


@dataclass(frozen=True, slots=True)
class SharedBasis:
    """Frozen bases shared by many adapters and this adapter's diagonals (VeRA, RandLoRA).

    With N blocks of r rows (VeRA: N = 1, no block_scale):

        u[ρ,n] = rank_scale[ρ,n] · Σ_k a[ρ,k] · block_scale[n,k] · x[k]
        y[m]   = out_scale[m] · Σ_{ρ,n} b[m, ρ·N+n] · u[ρ,n]

    or the transpose if ``transposed`` (RandLoRA with in_features > out_features). ``apply`` is the
    reference; ``factors`` unrolls to ordinary LoRA factors of rank N·r. All float32.
    """

    basis_digest: str  # identity of (a, b): adapters with equal digests share one copy
    a: Tensor  # [r, k]
    b: Tensor  # [m, N·r], column ρ·N+n
    rank_scale: Tensor  # [r, N]; every training-time scale is folded in
    block_scale: Tensor | None = None  # [N, k]
    out_scale: Tensor | None = None  # [m], scales the delta only; None when transposed
    transposed: bool = False  # False: k = in_features, m = out_features

    @property
    def rank(self) -> int:
        return int(self.rank_scale.numel())

    @property
    def in_features(self) -> int:
        return int(self.b.shape[0] if self.transposed else self.a.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.a.shape[1] if self.transposed else self.b.shape[0])

    def apply(self, x: Tensor) -> Tensor:
        """``x`` [n_rows, in_features] → delta [n_rows, out_features], in x's dtype."""
        a, b, rank_scale = (t.to(x.dtype) for t in (self.a, self.b, self.rank_scale))
        block_scale = None if self.block_scale is None else self.block_scale.to(x.dtype)
        if self.transposed:
            v = (x @ b).reshape(-1, *rank_scale.shape) * rank_scale  # [t, r, N]
            y = torch.einsum("trn,rk->tnk", v, a)
            return (y if block_scale is None else y * block_scale).sum(dim=1)
        blocks = x.unsqueeze(1) if block_scale is None else x.unsqueeze(1) * block_scale
        u = torch.einsum("tnk,rk->trn", blocks, a) * rank_scale
        y = u.flatten(1) @ b.t()
        return y if self.out_scale is None else y * self.out_scale.to(x.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A [N·r, in], B [out, N·r]) of the same delta."""
        rows = self.a.unsqueeze(1) * self.rank_scale.unsqueeze(2)  # [r, N, k]
        if self.block_scale is not None:
            rows = rows * self.block_scale
        flat = rows.flatten(0, 1)
        if self.transposed:
            return self.b.t().contiguous(), flat.t().contiguous()
        b = self.b if self.out_scale is None else self.b * self.out_scale.unsqueeze(1)
        return flat, b.contiguous()


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """The changes of one linear of the base. Absent parts are None."""

    a: Tensor | None = None  # float32 [rank, in_features]
    b: Tensor | None = None  # float32 [out_features, rank], scale folded in
    out_scale: Tensor | None = None  # float32 [out_features]
    bias: Tensor | None = None  # float32 [out_features], added last
    in_scale: Tensor | None = None  # float32 [in_features]
    shared: SharedBasis | None = None
    input_operator: RowMap | None = None
    delta_operator: Delta | None = None
    output_operator: RowMap | None = None

    @property
    def operators(self) -> tuple[Operator, ...]:
        operators = (self.input_operator, self.delta_operator, self.output_operator)
        return tuple(operator for operator in operators if operator is not None)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else int(self.a.shape[0])

    def tensors(self) -> Iterator[Tensor]:
        return tensors_of(self)


@dataclass(frozen=True, slots=True)
class NormPlan:
    """The parameters of a norm in place of the base's. None: the base's own."""

    weight: Tensor | None = None  # float32 [width], as in the checkpoint (Gemma: minus one)
    bias: Tensor | None = None  # float32 [width]


@dataclass(frozen=True, slots=True)
class StackedFactors:
    """ΔW_e = left[e] right[e] for a parameter that stacks the matrices of a MoE base's experts.

    A router's parameter is one matrix: n_experts is 1 here, and n_rows counts the base's experts.
    """

    left: Tensor  # float32 [n_experts, n_rows, rank], scale folded in
    right: Tensor  # float32 [n_experts, rank, n_columns]


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
    """Virtual tokens before the prompt."""

    keys: tuple[Tensor, ...] = ()  # per layer [n_virtual, n_kv_heads, head_dim], after RoPE
    values: tuple[Tensor, ...] = ()
    embeddings: Tensor | None = None  # [n_virtual, hidden_size] for prompt tuning

    @property
    def n_virtual(self) -> int:
        first = self.embeddings if self.embeddings is not None else self.keys[0]
        return int(first.shape[0])


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A classifier over the final hidden states: logits = weight @ h + bias."""

    task: HeadTask
    weight: Tensor  # float32 [n_labels, hidden_size]
    labels: tuple[str, ...]
    activation: Activation
    bias: Tensor | None = None  # float32 [n_labels]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, hidden_size] → [n, n_labels].

        Computed in float64, so that a row's bits do not depend on the number of rows.
        """
        logits = hidden.double() @ self.weight.double().t()
        return (logits if self.bias is None else logits + self.bias).float()


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """The pooling and normalisation of embeddings."""

    mode: PoolingMode
    normalize: bool  # to length 1


class PackedForm(Protocol):
    """The factors of an adapter in the engine's layout, made by a ``Packer``."""

    @property
    def n_bytes(self) -> int: ...

    def dump(self) -> tuple[JsonValue, Sequence[Tensor]]:
        """Return a header and contiguous host tensors, for ``Packer.restore``."""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter, folded and checked against its base. Immutable, shared between threads."""

    digest: str  # sha256 of config + tensors, hex
    family: Family
    modules: Mapping[str, ModulePlan]  # base module name, as "model.layers.0.self_attn.q_proj"
    experts: Mapping[str, ExpertPlan] = field(default_factory=dict)  # by block or projection
    prefix: PrefixPlan | None = None
    embedding_rows: Mapping[int, Tensor] = field(default_factory=dict)  # token id → row [hidden]
    head_rows: Mapping[int, Tensor] = field(default_factory=dict)  # token id → row of the head
    # linear or embedding → weight in place of the base's; deltas are computed from the base's
    replaced_weights: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, NormPlan] = field(default_factory=dict)  # by name of the norm
    stacked: Mapping[str, StackedFactors] = field(default_factory=dict)  # by name of the parameter
    head: HeadPlan | None = None  # of a classifier
    # Tokens from whose last occurrence in the prompt on the adapter acts; None: from the first on
    invocation: tuple[int, ...] | None = None
    pooling: PoolingPlan | None = None  # the adapter's own, if it ships one
    chat_template: str | None = None  # the adapter's own, if it ships one
    n_bytes: int = 0  # bytes of all tensors above and of ``packed_adapter``
    packed_adapter: PackedForm | None = None  # then modules and experts have no factors

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the plan, once for each reference, without the packed form."""
        for spec in fields(self):
            if spec.name != "packed_adapter":
                yield from tensors_of(getattr(self, spec.name))
