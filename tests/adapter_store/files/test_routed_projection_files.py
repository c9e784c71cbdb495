"""Faults in files of MoLA and LoRAMoE, as their authors write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, AdapterRefused, MalformedFile
from tests.support.bases.tiny_models import read_tensors, tiny_llama

SIZES = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (32, 52), "mlp.down_proj": (52, 32)}


def routed(leaf: str, n_experts: int, rank: int, gate: str, a: str, b: str) -> dict[str, Tensor]:
    """Three layers of one projection; ``a`` and ``b`` have {} in place of the expert's number."""
    n_in, n_out = SIZES[leaf]
    tensors = {}
    for layer in range(3):
        at = f"base_model.model.model.layers.{layer}.{leaf}"
        tensors[f"{at}.{gate}"] = torch.randn(n_experts, n_in)
        for expert in range(n_experts):
            tensors[f"{at}.{a.format(expert)}"] = torch.randn(rank, n_in)
            tensors[f"{at}.{b.format(expert)}"] = torch.randn(n_out, rank)
    return tensors


def config(*leaves: str, **values: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "lora_alpha": 9, "target_modules": list(leaves), **values}


def loramoe() -> dict[str, Tensor]:
    names = "lora_route.weight", "lora_A{}.weight", "lora_B{}.weight"
    return {**routed("mlp.up_proj", 4, 3, *names), **routed("mlp.down_proj", 4, 3, *names)}


def test_mola_without_top_k_asks_for_it(tmp_path: Path) -> None:
    names = "router.router.weight", "lora_A_{}.weight", "lora_B_{}.weight"
    tensors = routed("self_attn.q_proj", 4, 2, *names)
    with pytest.raises(MalformedFile, match='"top_k": 2'):
        read_tensors(config("q_proj", r=[2] * 3), tensors, tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("up_proj.lora_B2.weight", r"up_proj is incomplete: it lacks .*lora_B2\.weight"),
        ("down_proj.lora_route.weight", r"down_proj is incomplete: it lacks .*lora_A\.weight"),
    ],
)
def test_a_lost_tensor_is_named(lost: str, match: str, tmp_path: Path) -> None:
    tensors = loramoe()
    del tensors[f"base_model.model.model.layers.1.mlp.{lost}"]
    values = config("up_proj", "down_proj", r=3, lora_nums=4)
    with pytest.raises(AdapterMismatch, match=match):
        read_tensors(values, tensors, tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"lora_nums": 5}, "has 4 experts, the config says lora_nums 5"),
        ({"r": [3, 3]}, "r lists 2 layers, model.layers.2"),
        ({"r": 4}, r"lora_A0\.weight.*\[3, 52\], the base needs \[4, 52\]"),
    ],
)
def test_a_config_that_says_otherwise_is_refused(
    values: dict[str, Any], match: str, tmp_path: Path
) -> None:
    stated = config("up_proj", "down_proj", **{"r": 3, "lora_nums": 4, **values})
    with pytest.raises(AdapterRefused, match=match):
        read_tensors(stated, loramoe(), tiny_llama(), tmp_path)
