"""MixLoRA files: faults, and target modules as a table of flags."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile, UnsupportedAdapter
from tests.support.bases.tiny_models import read_tensors, tiny_llama

N, K, R, ALPHA = 4, 2, 3, 9
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


def test_target_modules_may_be_a_table_of_flags(tmp_path: Path) -> None:
    tensors = checkpoint()
    flags = dict.fromkeys((*ATTENTION, *MLP), True) | {"fc1": False}
    plans = [
        read_tensors(config(target_modules=targets), tensors, tiny_llama(), tmp_path).plan
        for targets in (flags, [*ATTENTION, *MLP])
    ]
    first, second = (list(plan.tensors()) for plan in plans)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
