"""Round trips of the rest of PEFT's methods against PEFT's own modules: ≤ 1e-4 in logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_adapter_store.errors import UnsupportedAdapter
from loraplex_adapter_store.operators.rotations import ButterflyRotation
from tests.support.round_trip import check_logits, check_round_trip, randomise, trained
from tests.support.tiny_models import PROMPT, read_path, tiny_gpt2, tiny_llama, untouched


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]

CONFIGS: dict[str, peft.PeftConfig] = {
    "hra": peft.HRAConfig(r=4, target_modules=ALL),
    "hra odd rank": peft.HRAConfig(r=5, target_modules=SOME),
    "hra orthogonal": peft.HRAConfig(r=3, apply_GS=True, target_modules=SOME),
    "delora": peft.DeloraConfig(r=5, target_modules=ALL),
    "delora ranks": peft.DeloraConfig(r=5, target_modules=SOME, rank_pattern={"v_proj": 2}),
    "gralora": peft.GraloraConfig(r=8, alpha=20, gralora_k=2, target_modules=ALL),
    "gralora hybrid": peft.GraloraConfig(
        r=8, alpha=20, gralora_k=4, hybrid_r=3, target_modules=SOME
    ),
    "vblora": peft.VBLoRAConfig(r=3, num_vectors=12, vector_length=4, topk=2, target_modules=ALL),
    "vblora top only": peft.VBLoRAConfig(
        r=3, num_vectors=12, vector_length=4, topk=3, save_only_topk_weights=True,
        target_modules=SOME,
    ),
    "unilora": peft.UniLoraConfig(r=3, theta_d_length=50, target_modules=ALL),
    "unilora saved": peft.UniLoraConfig(
        r=3, theta_d_length=50, save_indices=True, target_modules=SOME
    ),
    "psoft": peft.PsoftConfig(r=5, target_modules=ALL),
    "psoft series": peft.PsoftConfig(
        r=5, target_modules=SOME, use_cayley_neumann=True, cayley_neumann_eps=0.5,
        num_cayley_neumann_terms=4,
    ),
    "psoft free": peft.PsoftConfig(
        r=5, target_modules=SOME, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    ),
    "psoft pissa": peft.PsoftConfig(
        r=5, psoft_alpha=11, target_modules=SOME, ab_svd_init="pissa_init", psoft_mag_a=False
    ),
    "psoft drawn": peft.PsoftConfig(
        r=5, target_modules=ALL, psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=4
    ),
    "osf": peft.OSFConfig(effective_rank=28, target_modules=ALL),
    "osf half": peft.OSFConfig(target_modules=SOME),
    "pvera": peft.PveraConfig(r=4, target_modules=ALL),
    "deft": peft.DeftConfig(r=4, alpha=6, target_modules=ALL),
    "deft qr": peft.DeftConfig(r=4, decomposition_method="qr", target_modules=SOME),
    "deft para": peft.DeftConfig(r=4, para=True, target_modules=SOME),
    "peanut": peft.PeanutConfig(r=4, target_modules=ALL),
    "peanut deep": peft.PeanutConfig(
        r=4, depth=2, act_fn="silu", scaling=0.5, target_modules=SOME
    ),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=ALL),
    "lokr both": peft.LoKrConfig(
        r=1, alpha=2, decompose_both=True, decompose_factor=4, target_modules=ALL
    ),
    "lokr full": peft.LoKrConfig(r=40, alpha=20, target_modules=SOME, rank_pattern={"v_proj": 2}),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, target_modules=ALL),
    "oft cayley": peft.OFTConfig(
        r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=SOME
    ),
    "oft shared": peft.OFTConfig(oft_block_size=4, r=0, block_share=True, target_modules=SOME),
    "oft constrained": peft.OFTConfig(
        oft_block_size=4, r=0, coft=True, eps=0.9, num_cayley_neumann_terms=3, target_modules=SOME
    ),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "boft count": peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=SOME),
    "road 1": peft.RoadConfig(variant="road_1", group_size=4, target_modules=ALL),
    "road 2": peft.RoadConfig(variant="road_2", group_size=8, target_modules=SOME),
    "road 4": peft.RoadConfig(variant="road_4", group_size=2, target_modules=SOME),
    "fourierft": peft.FourierFTConfig(n_frequency=60, target_modules=ALL),
    "fourierft seed": peft.FourierFTConfig(
        n_frequency=60, scaling=90, random_loc_seed=5, n_frequency_pattern={"v_proj": 9},
        target_modules=SOME,
    ),
    "c3a": peft.C3AConfig(block_size=4, target_modules=ALL),
    "c3a pattern": peft.C3AConfig(
        block_size=16, block_size_pattern={"down_proj": 2}, target_modules=["q_proj", "down_proj"]
    ),
    "waveft": peft.WaveFTConfig(n_frequency=40, target_modules=ALL),
    "waveft db3": peft.WaveFTConfig(
        n_frequency=40, wavelet_family="db3", scaling=9, target_modules=ALL
    ),
    "waveft sym8": peft.WaveFTConfig(n_frequency=40, wavelet_family="sym8", target_modules=SOME),
    "waveft coif2": peft.WaveFTConfig(n_frequency=40, wavelet_family="coif2", target_modules=SOME),
    "waveft plain": peft.WaveFTConfig(
        n_frequency=40, use_idwt=False, random_loc_seed=3, target_modules=SOME
    ),
    "waveft proportional": peft.WaveFTConfig(
        n_frequency=40, proportional_parameters=True, target_modules=SOME
    ),
    "shira": peft.ShiraConfig(r=3, target_modules=ALL),
    "supertuning": peft.SupertuningConfig(sparsity=0.9, target_modules=ALL),
    "supertuning lora": peft.SupertuningConfig(
        sparsity=0.9, r=3, lora_alpha=5, select_top=False, target_modules=SOME
    ),
    "hira": peft.HiraConfig(r=3, target_modules=ALL),
    "glora": peft.GloraConfig(r=3, target_modules=ALL),
    "glora vectors": peft.GloraConfig(
        config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=SOME
    ),
    "glora constants": peft.GloraConfig(
        config_A_B="constant", config_C="none", config_D_E="constant", target_modules=SOME
    ),
    "frod": peft.FrodConfig(target_modules=SOME),
    "miss bat": peft.MissConfig(r=4, init_weights="bat", target_modules=ALL),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("bias", [False, True], ids=["", "biased base"])
def test_a_method_serves_as_it_was_trained(
    config: peft.PeftConfig, bias: bool, tmp_path: Path
) -> None:
    reading = check_round_trip(tiny_llama(bias=bias), config, tmp_path, std=0.3)
    assert reading.plan.family.value.upper() == config.peft_type.value


def _trained_prompt(config: peft.PeftConfig, path: Path) -> tuple[PreTrainedModel, Tensor]:
    """A trained prompt, saved to ``path``, and the logits of PEFT's own model behind it."""
    model = tiny_llama()
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, std=0.5)
    tuned.eval()
    tuned.save_pretrained(path)
    loaded = peft.PeftModel.from_pretrained(untouched(model), path).eval()
    with torch.inference_mode():
        mask = torch.ones_like(PROMPT)
        return model, loaded(input_ids=PROMPT, attention_mask=mask).logits[:, -PROMPT.shape[1] :]


@pytest.mark.parametrize("n_frozen", [0, 2])
def test_a_cartridge_is_served_as_a_prefix(tmp_path: Path, n_frozen: int) -> None:
    config = peft.CartridgeConfig(
        num_virtual_tokens=5, num_frozen_tokens=n_frozen, task_type="CAUSAL_LM"
    )
    model, expected = _trained_prompt(config, tmp_path)
    check_logits(model, read_path(tmp_path, model).plan, expected)


def test_a_context_prompt_is_served_as_virtual_tokens(tmp_path: Path) -> None:
    config = peft.CPTConfig(
        cpt_token_ids=[3, 9, 27],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
        opt_projection_epsilon=9.0,
        opt_projection_format_epsilon=9.0,
        task_type="CAUSAL_LM",
    )
    model, expected = _trained_prompt(config, tmp_path)
    check_logits(model, read_path(tmp_path, model).plan, expected)


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_one_task_of_a_multitask_prompt_is_served(tmp_path: Path, n_tasks: int) -> None:
    config = peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=4, num_tasks=n_tasks, num_ranks=2, task_type="CAUSAL_LM"
    )
    model = tiny_llama()
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, std=0.9)
    tuned.eval()
    tuned.save_pretrained(tmp_path)
    if n_tasks > 1:
        with pytest.raises(UnsupportedAdapter, match="add it once for each"):
            read_path(tmp_path, model)
    for task in range(n_tasks):
        task_ids = torch.full((PROMPT.shape[0],), task)
        with torch.no_grad():
            expected = tuned(input_ids=PROMPT, task_ids=task_ids).logits[:, -PROMPT.shape[1] :]
        values = json.loads((tmp_path / "adapter_config.json").read_text())
        if n_tasks > 1:
            values["loraplex_task_id"] = task
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        check_logits(model, read_path(tmp_path, model).plan, expected)


CONV1D: dict[str, peft.PeftConfig] = {
    "hira": peft.HiraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "fourierft": peft.FourierFTConfig(
        n_frequency=60, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "waveft": peft.WaveFTConfig(
        n_frequency=60, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "deft": peft.DeftConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "frod": peft.FrodConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "vblora": peft.VBLoRAConfig(
        r=3, num_vectors=12, vector_length=4, target_modules=["c_attn"], fan_in_fan_out=True
    ),
    "gralora": peft.GraloraConfig(
        r=4, gralora_k=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    ),
    "ln tuning": peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"]),
}


@pytest.mark.parametrize("config", CONV1D.values(), ids=CONV1D.keys())
def test_weights_stored_the_other_way_round_are_served_too(
    config: peft.PeftConfig, tmp_path: Path
) -> None:
    check_round_trip(tiny_gpt2(), config, tmp_path, std=0.3)


@pytest.mark.parametrize("targets", [None, ["norm"], r".*\.1\..*layernorm"])
def test_trained_norms_are_served(tmp_path: Path, targets: list[str] | str | None) -> None:
    config = peft.LNTuningConfig(target_modules=targets, task_type="CAUSAL_LM")
    reading = check_round_trip(tiny_llama(), config, tmp_path, std=0.3)
    assert len(reading.plan.norms) == {"None": 7, "['norm']": 1}.get(str(targets), 2)


def test_ln_tuning_of_a_linear_is_refused(tmp_path: Path) -> None:
    config = peft.LNTuningConfig(target_modules=["norm", "q_proj"])
    model = tiny_llama()
    trained(model, config, tmp_path)
    with pytest.raises(UnsupportedAdapter, match="q_proj; leave them"):
        read_path(tmp_path, model)


@pytest.mark.parametrize("n_factors", [2, 3])
def test_a_butterfly_of_several_factors_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_factors: int
) -> None:
    """PEFT needs a CUDA extension for them, which only puts blocks on a diagonal."""

    def on_diagonals(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft.FastBlockDiag, "apply", on_diagonals)
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=n_factors, target_modules=["q_proj", "o_proj"]
    )
    reading = check_round_trip(tiny_llama(bias=True), config, tmp_path, std=0.3)
    rotation = reading.plan.modules["model.layers.0.self_attn.q_proj"].input_operator
    assert isinstance(rotation, ButterflyRotation)
    assert rotation.blocks.shape == (n_factors, 8, 4, 4)


def test_places_of_the_largest_weights_are_found_again(tmp_path: Path) -> None:
    config = peft.SupertuningConfig(
        sparsity=0.9, save_precomputed_indices=False, target_modules=SOME
    )
    check_round_trip(tiny_llama(), config, tmp_path, std=0.3)


def test_noise_at_inference_is_refused(tmp_path: Path) -> None:
    config = peft.PveraConfig(r=4, target_modules=SOME, sample_at_inference=True)
    model = tiny_llama()
    trained(model, config, tmp_path)
    with pytest.raises(UnsupportedAdapter, match="another draw"):
        read_path(tmp_path, model)
