"""Round trips of PEFT's other methods against PEFT's own modules: ≤ 1e-4 in logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loraplex_adapter_store.errors import UnsupportedAdapter
from tests.support.round_trip import check_logits, check_round_trip, randomise, trained
from tests.support.tiny_models import PROMPT, read_path, tiny_llama, untouched


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS: dict[str, peft.PeftConfig] = {
    "adalora": peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=20, target_modules=["q_proj", "up_proj"], total_step=10
    ),
    "vera": peft.VeraConfig(r=5, target_modules=ALL),
    "randlora": peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=ALL),
    "randlora sparse": peft.RandLoraConfig(
        r=5, randlora_alpha=7, sparse=True, target_modules=["down_proj", "up_proj"]
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "beft": peft.BeftConfig(target_modules=["v_proj"]),
    "miss": peft.MissConfig(r=5, target_modules=["q_proj", "down_proj"]),
    "miss mini": peft.MissConfig(
        r=4, mini_r=8, init_weights="mini", target_modules=["q_proj", "v_proj"]
    ),
    "tinylora": peft.TinyLoraConfig(r=2, u=9, target_modules=["q_proj", "down_proj"]),
    "loha": peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_method_serves_as_it_was_trained(config: peft.PeftConfig, tmp_path: Path) -> None:
    model = tiny_llama()
    if config.is_prompt_learning:
        _check_prompt(config, tmp_path)
        return
    reading = check_round_trip(model, config, tmp_path, std=0.4)
    assert reading.plan.family.value in config.peft_type.value.lower().replace("_", "-")


def _check_prompt(config: peft.PeftConfig, path: Path) -> None:
    model = tiny_llama()
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, std=0.5)
    tuned.eval()
    tuned.save_pretrained(path)
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT).logits[:, -PROMPT.shape[1] :]
    check_logits(model, read_path(path, model).plan, expected)


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "with MLP"])
def test_prefix_tuning_starts_real_tokens_after_the_prefix(
    tmp_path: Path, projection: bool
) -> None:
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=projection
    )
    model = tiny_llama()
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, std=0.5)
    tuned.eval()
    tuned.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    reading = read_path(tmp_path, model)
    check_logits(model, reading.plan, expected)
    assert reading.plan.prefix is not None
    assert reading.plan.prefix.keys[0].shape == (5, 2, 8)


def test_adalora_keeps_its_scale_when_ranks_were_pruned(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, target_modules=["q_proj", "v_proj"], total_step=10, tinit=1, tfinal=1
    )
    model = tiny_llama()
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, 0.5)
    pattern = {}
    for name, module in tuned.named_modules():
        if hasattr(module, "lora_E"):
            keep = [True, False, True, False, False, True] if "q_proj" in name else [False] * 6
            module.lora_E["default"].data[~torch.tensor(keep)] = 0
            pattern[f"{name.removeprefix('base_model.model.')}.lora_E"] = keep
    tuned.peft_config["default"].rank_pattern = pattern
    tuned.eval()
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT).logits
    tuned.save_pretrained(tmp_path)
    reading = read_path(tmp_path, model)
    check_logits(model, reading.plan, expected)
    assert {module.rank for module in reading.plan.modules.values()} == {3}


def test_lora_ga_converted_by_peft_is_a_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model = tiny_llama()
    tuned = _trained_pissa(model, tmp_path)
    expected = _logits(tuned)
    tuned.save_pretrained(
        tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    reading = read_path(tmp_path / "final", model)
    check_logits(model, reading.plan, expected)
    assert {module.rank for module in reading.plan.modules.values()} == {8}


def test_a_randomised_pissa_without_its_initial_factors_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", target_modules=["q_proj"])
    model = tiny_llama()
    trained(model, config, tmp_path)
    with pytest.raises(UnsupportedAdapter, match="initial factors"):
        read_path(tmp_path, model)


def _trained_pissa(model: Any, path: Path) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", target_modules=["q_proj"])
    tuned = peft.get_peft_model(untouched(model), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(path / "initial")
    tuned.peft_config["default"].init_lora_weights = "pissa_niter_4"
    randomise(tuned)
    return tuned.eval()


def _logits(model: peft.PeftModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPT).logits


def test_vera_and_randlora_hold_no_dense_delta(tmp_path: Path) -> None:
    model = tiny_llama()
    for number, config in enumerate((CONFIGS["vera"], CONFIGS["randlora"])):
        path = tmp_path / str(number)
        trained(model, config, path)
        plan = read_path(path, model).plan
        assert all(module.a is None and module.shared for module in plan.modules.values())
        found = [module.shared for module in plan.modules.values() if module.shared]
        pairs = {(basis.basis_digest, basis.a.shape, basis.b.shape) for basis in found}
        assert len(pairs) == len({digest for digest, _, _ in pairs}), "a digest names one pair"
        assert len({basis.a.untyped_storage().data_ptr() for basis in found}) == 1
        assert len({basis.b.untyped_storage().data_ptr() for basis in found}) <= 3


def test_vera_without_its_bases_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    config = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    trained(model, config, tmp_path)
    with pytest.raises(UnsupportedAdapter, match="save_projection"):
        read_path(tmp_path, model)


REFUSED: dict[str, peft.PeftConfig] = {
    "lily": peft.LilyConfig(r=4, target_modules=["q_proj"]),
    "adaption prompt": peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"
    ),
    "aLoRA": peft.LoraConfig(
        r=4, target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED.keys())
def test_a_method_that_cannot_be_served_is_named_and_explained(
    config: peft.PeftConfig, tmp_path: Path
) -> None:
    model = tiny_llama()
    peft.get_peft_model(untouched(model), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapter, match="cannot be served"):
        read_path(tmp_path, model)
