"""MixLoRA, MoLA and LoRAMoE files: published and legacy names, against a block from the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.plan import RoutingStrategy
from tests.support.round_trip import check_logits, patched_logits
from tests.support.tiny_models import read_tensors, tiny_llama

N, K, R, ALPHA = 4, 2, 3, 9
SCALE = ALPHA / R
HIDDEN, FF, HEADS, KV = 32, 52, 32, 16
ATTENTION = {"q_proj": HEADS, "k_proj": KV, "v_proj": KV, "o_proj": HIDDEN}
MLP = {"gate_proj": (HIDDEN, FF), "up_proj": (HIDDEN, FF), "down_proj": (FF, HIDDEN)}


def config(**values: Any) -> dict[str, Any]:
    return {
        "bias": "none",
        "peft_type": "MIXLORA",
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": [*ATTENTION, *MLP],
        "routing_strategy": "mixlora",
        "num_experts": N,
        "act_fn": "silu",
        "top_k": K,
        "base_model_name_or_path": "/home/author/llama",
        "task_type": "QUESTION_ANS",
        **values,
    }


def checkpoint(*, expert_rank: int = R, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors: dict[str, Tensor] = {}
    for layer in range(3):
        root = f"mixlora.layers.{layer}"
        for name, width in ATTENTION.items():
            tensors[f"{root}.self_attn.{name}.lora_A.weight"] = randn(R, HIDDEN)
            tensors[f"{root}.self_attn.{name}.lora_B.weight"] = randn(width, R)
        tensors[f"{root}.mlp.moe_gate.weight"] = randn(N, HIDDEN) * 3
        for name, (n_in, n_out) in MLP.items():
            for expert in range(N):
                at = f"{root}.mlp.{name}.experts.{expert}"
                tensors[f"{at}.lora_A.weight"] = randn(expert_rank, n_in)
                tensors[f"{at}.lora_B.weight"] = randn(n_out, expert_rank)
    return tensors


def weights_of(p: Tensor, strategy: str) -> Tensor:
    """[…, N] from softmax probabilities, token by token, as the paper's algorithm says."""
    flat = p.reshape(-1, N)
    out = torch.zeros_like(flat)
    for token, row in enumerate(flat):
        order = row.argsort(descending=True)
        if strategy == "mixlora":
            kept = order[:K]
            out[token, kept] = row[kept] / row[kept].sum()
        elif strategy == "mixlora-dynamic":
            total = 0.0
            for index in order:
                out[token, index] = row[index]
                total += float(row[index])
                if total > 0.8:
                    break
        else:
            out[token, order[0]] = row[order[0]]
    return out.reshape(p.shape)


def training_time(
    tensors: dict[str, Tensor], strategy: str, expert_scale: float = SCALE
) -> dict[str, Any]:
    """The formula of the paper, by module; experts without factors in ``tensors`` are the base."""
    forwards: dict[str, Any] = {}
    for layer in range(3):
        root = f"mixlora.layers.{layer}"
        for name in ATTENTION:
            a, b = (tensors[f"{root}.self_attn.{name}.lora_{part}.weight"] for part in "AB")
            forwards[f"model.layers.{layer}.self_attn.{name}"] = lambda module, x, a=a, b=b: (
                F.linear(x, module.weight) + SCALE * F.linear(F.linear(x, a), b)
            )

        def block(mlp: nn.Module, hidden: Tensor, root: str = root) -> Tensor:
            p = torch.softmax(F.linear(hidden, tensors[f"{root}.mlp.moe_gate.weight"]), dim=-1)
            weights = weights_of(p, strategy)
            output = torch.zeros_like(hidden)
            for expert in range(N):

                def project(leaf: str, x: Tensor, expert: int = expert) -> Tensor:
                    at = f"{root}.mlp.{leaf}.experts.{expert}"
                    if f"{at}.lora_A.weight" not in tensors:
                        return F.linear(x, getattr(mlp, leaf).weight)
                    low = F.linear(x, tensors[f"{at}.lora_A.weight"])
                    delta = F.linear(low, tensors[f"{at}.lora_B.weight"])
                    return F.linear(x, getattr(mlp, leaf).weight) + expert_scale * delta

                act = F.silu(project("gate_proj", hidden)) * project("up_proj", hidden)
                output += weights[..., expert : expert + 1] * project("down_proj", act)
            return output

        forwards[f"model.layers.{layer}.mlp"] = block
    return forwards


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
def test_mixlora_serves_as_it_was_trained(strategy: str, tmp_path: Path) -> None:
    model, tensors = tiny_llama(), checkpoint()
    reading = read_tensors(config(routing_strategy=strategy), tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, training_time(tensors, strategy)))
    assert len(reading.plan.experts) == 3
    assert len(reading.report.matched) == len(tensors)


@pytest.mark.parametrize("strategy", ["mixlora", "mixlora-dynamic", "mixlora-switch"])
@pytest.mark.parametrize("mlp", [[], ["up_proj"]], ids=["attention only", "one projection"])
def test_a_gate_scales_its_block_whatever_its_experts_adapt(
    strategy: str, mlp: list[str], tmp_path: Path
) -> None:
    model = tiny_llama()
    tensors = {
        name: tensor
        for name, tensor in checkpoint().items()
        if ".experts." not in name or any(f".{leaf}." in name for leaf in mlp)
    }
    values = config(routing_strategy=strategy, target_modules=[*ATTENTION, *mlp])
    reading = read_tensors(values, tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, training_time(tensors, strategy)))


def test_expert_lora_overrides_rank_and_scale_of_the_experts(tmp_path: Path) -> None:
    model, tensors = tiny_llama(), checkpoint(expert_rank=2)
    values = config(expert_lora={"r": 2, "lora_alpha": 10})
    reading = read_tensors(values, tensors, model, tmp_path)
    expected = patched_logits(model, training_time(tensors, "mixlora", expert_scale=5.0))
    check_logits(model, reading.plan, expected)


def test_target_modules_may_be_a_table_of_flags(tmp_path: Path) -> None:
    model, tensors = tiny_llama(), checkpoint()
    flags = dict.fromkeys((*ATTENTION, *MLP), True) | {"fc1": False}
    reading = read_tensors(config(target_modules=flags), tensors, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, training_time(tensors, "mixlora")))


@pytest.mark.parametrize(
    ("legacy_strategy", "strategy"), [("mixtral", "mixlora"), ("switch", "mixlora-switch")]
)
def test_legacy_names_mean_the_same(legacy_strategy: str, strategy: str, tmp_path: Path) -> None:
    model, tensors = tiny_llama(), checkpoint()
    legacy = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        new = key.replace(".mlp.moe_gate.", ".gate.")
        for name, old in legacy.items():
            for expert in range(N):
                new = new.replace(f".mlp.{name}.experts.{expert}.", f".experts.{expert}.{old}.")
        renamed[new] = tensor
    assert any(".experts.0.w1_proj.lora_A" in key for key in renamed)
    targets = dict.fromkeys((*ATTENTION, *legacy.values()), True)
    values = config(routing_strategy=legacy_strategy, target_modules=targets)
    reading = read_tensors(values, renamed, model, tmp_path)
    check_logits(model, reading.plan, patched_logits(model, training_time(tensors, strategy)))
    assert reading.plan.experts["model.layers.0.mlp"].strategy is RoutingStrategy(strategy)


@pytest.mark.parametrize(
    "lost",
    [
        "mixlora.layers.1.mlp.moe_gate.weight",
        "mixlora.layers.2.mlp.up_proj.experts.3.lora_A.weight",
        "mixlora.layers.0.self_attn.k_proj.lora_B.weight",
    ],
)
def test_a_missing_tensor_is_named(lost: str, tmp_path: Path) -> None:
    tensors = checkpoint()
    del tensors[lost]
    with pytest.raises(AdapterMismatch, match=r"mlp|k_proj"):
        read_tensors(config(), tensors, tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"act_fn": "gelu"}, UnsupportedAdapter, "act_fn"),
        ({"routing_strategy": "dynmole"}, UnsupportedAdapter, "dynmole"),
        ({"top_k": 9}, MalformedFile, "top_k"),
        ({"num_experts": 5}, AdapterMismatch, "experts"),
        ({"routing_strategy": "mixlora-dynamic", "temperature": 0.5}, UnsupportedAdapter, "temp"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    values: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        read_tensors(config(**values), checkpoint(), tiny_llama(), tmp_path)


def test_a_classifier_head_is_refused(tmp_path: Path) -> None:
    tensors = checkpoint() | {"classifier": torch.zeros(3, HIDDEN)}
    with pytest.raises(UnsupportedAdapter, match="classifier"):
        read_tensors(config(), tensors, tiny_llama(), tmp_path)
