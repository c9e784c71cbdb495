"""LoRA on the experts and routers of MoE bases, read and run, against PEFT."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.round_trip import (
    TOLERANCE,
    check_logits,
    check_round_trip,
    randomise,
)
from tests.support.adapters.single_experts import save_single_experts, single_experts
from tests.support.bases.tiny_models import PROMPT, read_path, read_tensors, untouched
from tests.support.servers.engines import generate_all, running_engine

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, logprobs=0, prompt_logprobs=0)
_SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 63,
}
TARGETS: Mapping[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "router": {"target_parameters": ["gate.weight"]},
    "beside linears": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "use_rslora": True,
    },
}


@pytest.fixture(autouse=True)
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _moe(model_type: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def _config(options: dict[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, lora_alpha=5, **{"target_modules": [], **options})


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_factors_of_experts_are_read_as_peft_packs_them(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = _moe(model_type)
    router = "router.weight" if model_type == "gpt_oss" else "gate.weight"
    names = [name.replace("gate.weight", router) for name in options["target_parameters"]]
    options = {**options, "target_parameters": names}
    reading = check_round_trip(model, _config(options), tmp_path, std=0.3)
    assert len(reading.plan.stacked) == 2 * len(names)
    assert any("experts and routers" in note for note in reading.report.notes)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_all_linear_changes_experts_and_routers(model_type: str, tmp_path: Path) -> None:
    options = {"target_modules": "all-linear", "rank_pattern": {"gate.weight": 2}}
    options["alpha_pattern"] = {"gate.weight": 9, "down_proj": 4}
    reading = check_round_trip(_moe(model_type), _config(options), tmp_path, std=0.3)
    leaves = {name.rpartition("mlp.")[2] for name in reading.plan.stacked}
    assert leaves == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_tensors_of_single_experts_are_read_as_peft_loads_them(
    model_type: str, tmp_path: Path
) -> None:
    model = _moe(model_type)
    save_single_experts(model, tmp_path)
    tuned = peft.PeftModel.from_pretrained(untouched(model), tmp_path).eval()
    with torch.inference_mode():
        expected = tuned(input_ids=PROMPT).logits
    check_logits(model, read_path(tmp_path, model).plan, expected)


def test_a_file_that_lacks_a_targeted_expert_is_refused_by_name(tmp_path: Path) -> None:
    model = _moe("qwen3_moe")
    config, tensors = single_experts(model)
    lost = "model.layers.1.mlp.experts.2.up_proj"
    kept = {name: tensor for name, tensor in tensors.items() if lost not in name}
    with pytest.raises(AdapterMismatch) as caught:
        read_tensors(config, kept, model, tmp_path)
    assert any(lost in detail for detail in caught.value.problems)


def test_another_rank_for_one_expert_keeps_the_scale_of_the_others(tmp_path: Path) -> None:
    model = _moe("qwen3_moe")
    config, tensors = single_experts(model)
    plain = read_tensors(config, tensors, model, tmp_path).plan.stacked
    other = "model.layers.0.mlp.experts.1.gate_proj"
    key = f"base_model.model.{other}.lora_{{}}.weight"
    tensors[key.format("A")] = tensors[key.format("A")][:1]
    tensors[key.format("B")] = tensors[key.format("B")][:, :1]
    config = {**config, "rank_pattern": {other: 1}, "alpha_pattern": {other: 2}}
    changed = read_tensors(config, tensors, model, tmp_path).plan.stacked
    name = "model.layers.0.mlp.experts.gate_up_proj"
    product = tensors[key.format("B")] @ tensors[key.format("A")] * 2
    delta = changed[name].left @ changed[name].right
    assert torch.allclose(delta[1, :48], product)
    assert torch.allclose(delta[1, 48:], (plain[name].left @ plain[name].right)[1, 48:])
    assert torch.allclose(delta[2], (plain[name].left @ plain[name].right)[2])


def test_square_experts_are_read_the_way_their_base_stores_them(tmp_path: Path) -> None:
    for number, model_type in enumerate(("mixtral", "gpt_oss")):
        model = _moe(model_type, intermediate_size=32)
        options = {"target_parameters": ["experts.down_proj"]}
        check_round_trip(model, _config(options), tmp_path / str(number), std=0.3)


def test_a_parameter_that_the_base_lacks_is_refused_by_name(tmp_path: Path) -> None:
    model = _moe("mixtral")
    _tuned(model, _config(TARGETS["down"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("mlp.experts.down_proj", "experts.w2"))
    with pytest.raises(AdapterMismatch, match=r"experts\.w2"):
        read_path(tmp_path, model)


def test_a_parameter_of_a_linear_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = _moe("mixtral")
    _tuned(model, _config({"target_parameters": ["q_proj.weight"]}), tmp_path)
    with pytest.raises(UnsupportedAdapter, match="name its module in target_modules"):
        read_path(tmp_path, model)


def test_rows_that_change_experts_share_steps_with_others_exactly(tmp_path: Path) -> None:
    model = _moe("mixtral")
    tuned = {
        name: _tuned(model, _config(options), tmp_path / str(number))
        for number, (name, options) in enumerate(TARGETS.items())
    }
    plans = [read_path(tmp_path / str(number), model).plan for number in range(len(tuned))]
    prompts = [
        [5, 9, 33, 7],
        [2, 60, 5],
        [9, 1, 50, 4, 6],
        [3, 8, 21, 40, 11],
        [1, 2, 3],
        [7, 7, 7, 9],
    ]
    oracles = [*tuned.values(), model, tuned["down"]]
    with running_engine(model, adapter_memory_bytes=32 << 20) as engine:
        answers = generate_all(engine, prompts, GREEDY, [*plans, None, plans[1]])
    for prompt, oracle, answer in zip(prompts, oracles, answers, strict=True):
        assert answer.last.error is None
        tokens = torch.tensor([prompt + answer.generated])
        with torch.inference_mode():
            want = torch.log_softmax(oracle(input_ids=tokens).logits[0], dim=-1)
        given = [lp for lp in answer.events[0].prompt_logprobs if lp is not None]
        given += [lp for event in answer.events for lp in event.logprobs]
        expected = want[:-1].gather(1, tokens[0, 1:].unsqueeze(1)).squeeze(1)
        found = torch.tensor([lp.logprob for lp in given])
        assert float((found - expected).abs().max()) <= TOLERANCE


def _tuned(model: PreTrainedModel, config: peft.LoraConfig, path: Path) -> peft.PeftModel:
    tuned = peft.get_peft_model(untouched(model), config)
    randomise(tuned, std=0.3)
    tuned.eval()
    tuned.save_pretrained(path)
    return tuned
