"""Round trips of plain LoRA and its kin against PEFT's own modules: ≤ 1e-4 in logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora.config import BdLoraConfig

from tests.support.round_trip import check_round_trip
from tests.support.tiny_models import tiny_gpt2, tiny_llama


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


LORA_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 9, "lora_alpha": 12, "use_rslora": True, "target_modules": ["k_proj"]},
    "all-linear": {"r": 3, "target_modules": "all-linear"},
    "regex": {"r": 3, "target_modules": r".*\.(0|2)\.mlp\.(gate|down)_proj"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {r"layers.(0|2).self_attn.q_proj": 21},
    },
    "layer subset (Flexora)": {
        "r": 4,
        "target_modules": ["o_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "module subset (DiffoRA)": {
        "r": 4,
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"],
    },
    "excluded": {
        "r": 4,
        "target_modules": ["q_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    "scale one (ALLoRA)": {"r": 6, "lora_alpha": 6, "target_modules": ["v_proj"]},
    "lora_bias": {"r": 4, "lora_alpha": 16, "lora_bias": True, "target_modules": ["o_proj"]},
    "head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 4, "target_modules": ["v_proj", "embed_tokens"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora + rslora": {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ["k_proj"]},
    "saved head and norm": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "model.norm"],
    },
    "trainable tokens": {
        "r": 4,
        "target_modules": ["q_proj"],
        "trainable_token_indices": [5, 33, 62],
    },
    "pissa": {"r": 4, "init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
    "olora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "olora", "target_modules": ["v_proj"]},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["v_proj"]},
    "eva-like (gaussian)": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["v_proj"]},
    "block-diagonal (BD-LoRA)": {
        "r": 4,
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2
        ),
        "target_modules": ["q_proj", "o_proj"],
    },
    "kasa": {"r": 4, "kasa_config": peft.KasaConfig(), "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("values", LORA_CONFIGS.values(), ids=LORA_CONFIGS.keys())
def test_a_lora_serves_as_it_was_trained(values: dict[str, Any], tmp_path: Path) -> None:
    check_round_trip(tiny_llama(), peft.LoraConfig(**values), tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"bias": "lora_only"},
        {"bias": "all"},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=["lora_only", "all", "dora", "lora_bias"],
)
def test_biases_of_a_base_that_has_them_are_kept_or_replaced(
    values: dict[str, Any], tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **values)
    check_round_trip(tiny_llama(bias=True), config, tmp_path)


def test_trained_tokens_reach_the_tied_head_too(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 33])
    check_round_trip(tiny_llama(tied=True), config, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_alone_serve_as_trained(tmp_path: Path, tied: bool) -> None:
    config = peft.TrainableTokensConfig(token_indices=[5, 33, 60])
    check_round_trip(tiny_llama(tied=tied), config, tmp_path, std=1.0)


def test_a_lora_on_the_tied_embedding_leaves_the_head_alone(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    check_round_trip(tiny_llama(tied=True), config, tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_modules_of_gpt2_serve_as_trained(tmp_path: Path, dora: bool) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], use_dora=dora, fan_in_fan_out=True
    )
    check_round_trip(tiny_gpt2(), config, tmp_path)


TIED: dict[str, dict[str, Any]] = {
    "adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted head, too": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied base", "untied base"])
@pytest.mark.parametrize("options", TIED.values(), ids=TIED.keys())
def test_ensured_weight_tying_changes_the_head_with_the_embedding(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=3, ensure_weight_tying=True, **options)
    check_round_trip(tiny_llama(tied=tied), config, tmp_path)
