"""MixLoRA, MoLA and LoRAMoE in all layers, each against its formula, every expert on every row.

MixLoRA  MLP block: y = Σ_e w_e MLP_e(h); an expert without a LoRA on a projection uses the base's
MoLA     each projection: y = W x + Σ_e w_e s B_e A_e x, top-k renormalised
LoRAMoE  the same with all softmax weights
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from tests.conformance.oracle import Forward
from tests.conformance.own_row import FormulaAdapter, OwnRow, Random

_N, _K, _TOP_P, _R, _ALPHA = 4, 2, 0.8, 2, 4
_SCALE = _ALPHA / _R
_STD = 0.03
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LEGACY = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}

Build = Callable[[PreTrainedModel, Random], FormulaAdapter]


def _gates(p: Tensor, strategy: str) -> Tensor:
    """[…, n] weights from softmax probabilities […, n], row by row, as published."""
    flat = p.flatten(0, -2)
    out = torch.zeros_like(flat)
    for row, probabilities in enumerate(flat):
        order = probabilities.argsort(descending=True)
        if strategy == "top-k":
            kept = order[:_K]
            out[row, kept] = probabilities[kept] / probabilities[kept].sum()
        elif strategy == "top-p":
            total = 0.0
            for index in order:
                out[row, index] = probabilities[index]
                total += float(probabilities[index])
                if total > _TOP_P:
                    break
        elif strategy == "switch":
            out[row, order[0]] = probabilities[order[0]]
        else:  # dense
            out[row] = probabilities
    return out.reshape(p.shape)


def _shape(base: PreTrainedModel, layer: int, leaf: str) -> tuple[str, int, int]:
    """(block, in, out) of one projection."""
    block = "self_attn" if leaf in _ATTENTION else "mlp"
    module = base.get_submodule(f"model.layers.{layer}.{block}.{leaf}")
    return block, module.in_features, module.out_features


def _activation(base: PreTrainedModel) -> str:
    """Return the name of the activation that the base's MLP has."""
    config = base.config
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _config(peft_type: str, targets: Sequence[str], **values: object) -> dict[str, object]:
    return {
        "bias": "none",
        "peft_type": peft_type,
        "r": _R,
        "lora_alpha": _ALPHA,
        "target_modules": list(targets),
        "routing_strategy": "mixlora",
        "num_experts": _N,
        "act_fn": "silu",
        "top_k": _K,
        "task_type": "CAUSAL_LM",
        **values,
    }


def _mixlora(
    targets: Sequence[str],
    strategy: str = "mixlora",
    *,
    expert_rank: int = _R,
    expert_alpha: int | None = None,
    legacy: bool = False,
    n_experts: int = _N,
    gate_std: float = 0.2,
) -> Build:
    """``legacy``: the key names of the first releases.

    Switch scales every block by its largest probability, which must not be small: in thirty layers
    that amplifies rounding. It has fewer experts and sharper gates.
    """
    gates = {"mixlora": "top-k", "mixlora-dynamic": "top-p", "mixlora-switch": "switch"}[strategy]
    expert_scale = _SCALE if expert_alpha is None else expert_alpha / expert_rank

    def build(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
        tensors: dict[str, Tensor] = {}
        forwards: dict[str, Forward] = {}
        for layer in range(base.config.num_hidden_layers):
            root = f"mixlora.layers.{layer}"
            for leaf in (leaf for leaf in _ATTENTION if leaf in targets):
                block, n_in, n_out = _shape(base, layer, leaf)
                a, b = randn(_R, n_in, std=_STD), randn(n_out, _R, std=_STD)
                tensors[f"{root}.{block}.{leaf}.lora_A.weight"] = a
                tensors[f"{root}.{block}.{leaf}.lora_B.weight"] = b
                forwards[f"model.layers.{layer}.{block}.{leaf}"] = _plain(a, b)
            gate = randn(n_experts, base.config.hidden_size, std=gate_std)
            tensors[f"{root}.gate.weight" if legacy else f"{root}.mlp.moe_gate.weight"] = gate
            experts: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(n_experts)]
            for leaf in (leaf for leaf in _MLP if leaf in targets):
                _, n_in, n_out = _shape(base, layer, leaf)
                for number, expert in enumerate(experts):
                    a, b = randn(expert_rank, n_in, std=_STD), randn(n_out, expert_rank, std=_STD)
                    at = f"{root}.mlp.{leaf}.experts.{number}"
                    if legacy:
                        at = f"{root}.experts.{number}.{_LEGACY[leaf]}"
                    tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = a, b
                    expert[leaf] = a, b
            forwards[f"model.layers.{layer}.mlp"] = _routed(gate, experts, gates, expert_scale)
        values: dict[str, object] = {
            "act_fn": _activation(base),
            "routing_strategy": strategy,
            "top_p": _TOP_P,
            "num_experts": n_experts,
        }
        if expert_alpha is not None:
            values["expert_lora"] = {"r": expert_rank, "lora_alpha": expert_alpha}
        return FormulaAdapter(_config("MIXLORA", targets, **values), tensors, forwards)

    return build


def _plain(a: Tensor, b: Tensor) -> Forward:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, module.weight, module.bias) + _SCALE * F.linear(F.linear(x, a), b)

    return forward


def _routed(
    gate: Tensor, experts: Sequence[dict[str, tuple[Tensor, Tensor]]], gates: str, scale: float
) -> Forward:
    def forward(mlp: nn.Module, hidden: Tensor) -> Tensor:
        weights = _gates(torch.softmax(F.linear(hidden, gate), dim=-1), gates)
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(experts):

            def project(leaf: str, x: Tensor, expert: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
                y = F.linear(x, getattr(mlp, leaf).weight)
                if leaf in expert:
                    a, b = expert[leaf]
                    y = y + scale * F.linear(F.linear(x, a), b)
                return y

            gated = mlp.act_fn(project("gate_proj", hidden, expert))
            act = gated * project("up_proj", hidden, expert)
            output += weights[..., number, None] * project("down_proj", act, expert)
        return output

    return forward


class _Names(NamedTuple):
    """Tensor names of one routed projection; ``{}`` is the number of the expert."""

    root: str
    gate: str
    a: str
    b: str


_MOE_PEFT = _Names("{}.", "moe_gate.weight", "experts.{}.lora_A.weight", "experts.{}.lora_B.weight")
_AUTHORS_MOLA = _Names(
    "base_model.model.model.", "router.router.weight", "lora_A_{}.weight", "lora_B_{}.weight"
)
_AUTHORS_LORAMOE = _Names(
    "base_model.model.model.", "lora_route.weight", "lora_A{}.weight", "lora_B{}.weight"
)


def _per_projection(
    family: str,
    routed: Sequence[str],
    names: _Names = _MOE_PEFT,
    *,
    plain: Sequence[str] = (),
    counts: Sequence[int] = (_N,),
    ranks: Sequence[int] = (_R,),
) -> Build:
    """``plain``: projections without a gate. Experts and ranks repeat over the layers."""
    gates = "top-k" if family == "mola" else "dense"
    root = names.root.format(family)

    def build(base: PreTrainedModel, randn: Random) -> FormulaAdapter:
        tensors: dict[str, Tensor] = {}
        forwards: dict[str, Forward] = {}
        n_layers = base.config.num_hidden_layers
        for layer in range(n_layers):
            count, rank = counts[layer % len(counts)], ranks[layer % len(ranks)]
            for leaf in (*routed, *plain):
                block, n_in, n_out = _shape(base, layer, leaf)
                at = f"{root}layers.{layer}.{block}.{leaf}"
                module = f"model.layers.{layer}.{block}.{leaf}"
                if leaf in plain:
                    a, b = randn(rank, n_in, std=_STD), randn(n_out, rank, std=_STD)
                    tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
                    forwards[module] = _plain(a, b)
                    continue
                gate = randn(count, n_in, std=0.2)
                a, b = randn(count, rank, n_in, std=_STD), randn(count, n_out, rank, std=_STD)
                tensors[f"{at}.{names.gate}"] = gate
                for number in range(count):
                    tensors[f"{at}.{names.a.format(number)}"] = a[number]
                    tensors[f"{at}.{names.b.format(number)}"] = b[number]
                forwards[module] = _mixed(gate, a, b, gates, _ALPHA / rank)
        config = _config(family.upper(), (*routed, *plain), routing_strategy=family)
        if names is not _MOE_PEFT:  # their files look like a LoRA's
            config = {
                "peft_type": "LORA",
                "r": _R if len(ranks) == 1 else [ranks[i % len(ranks)] for i in range(n_layers)],
                "lora_alpha": _ALPHA,
                "target_modules": list(routed),
                **({"top_k": _K} if family == "mola" else {"lora_nums": _N}),
            }
        return FormulaAdapter(config, tensors, forwards)

    return build


def _mixed(gate: Tensor, a: Tensor, b: Tensor, gates: str, scale: float) -> Forward:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        weights = _gates(torch.softmax(F.linear(x, gate), dim=-1), gates)
        y = F.linear(x, module.weight)
        for number in range(len(gate)):
            delta = F.linear(F.linear(x, a[number]), b[number])
            y = y + scale * weights[..., number, None] * delta
        return y

    return forward


_BOTH = (*_ATTENTION, *_MLP)

EXPERT_ROWS: tuple[OwnRow, ...] = (
    OwnRow("mixlora", _mixlora(_BOTH), executor=True),
    OwnRow("mixlora-top-p", _mixlora(_BOTH, "mixlora-dynamic"), executor=True),
    OwnRow(
        "mixlora-switch",
        _mixlora(_BOTH, "mixlora-switch", n_experts=2, gate_std=0.5),
        executor=True,
    ),
    OwnRow("mixlora-legacy-names", _mixlora(_MLP, legacy=True)),
    OwnRow("mixlora-expert-lora", _mixlora(_MLP, expert_rank=3, expert_alpha=9)),
    OwnRow("mixlora-one-projection", _mixlora(("q_proj", "up_proj"))),
    OwnRow("mixlora-attention", _mixlora(_ATTENTION)),
    OwnRow("mixlora-attention-top-p", _mixlora(_ATTENTION, "mixlora-dynamic")),
    OwnRow(
        "mixlora-attention-switch",
        _mixlora(_ATTENTION, "mixlora-switch", n_experts=2, gate_std=0.5),
    ),
    OwnRow("mola", _per_projection("mola", ("q_proj", "up_proj", "down_proj")), executor=True),
    OwnRow(
        "mola-authors",
        _per_projection(
            "mola", ("q_proj", "up_proj"), _AUTHORS_MOLA, counts=(2, 4, 6), ranks=(2, 3)
        ),
    ),
    OwnRow("loramoe", _per_projection("loramoe", ("up_proj", "down_proj")), executor=True),
    OwnRow("loramoe-attention", _per_projection("loramoe", ("q_proj", "up_proj"))),
    OwnRow("loramoe-plain-attention", _per_projection("loramoe", ("up_proj",), plain=("q_proj",))),
    OwnRow("loramoe-authors", _per_projection("loramoe", ("up_proj",), _AUTHORS_LORAMOE)),
)
