"""Adapters that are more than factors on linears answer as PEFT's own model does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.engine.requests.events import TokenEvent
from tests.support.adapters.peft_adapters import PeftAdapter, peft_adapter
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.servers.engines import GREEDY, Answer, generate_all, running_engine

N_TOKENS = 6
SAMPLING = replace(GREEDY, max_tokens=N_TOKENS, logprobs=1)
PROMPTS = [[5, 9, 200, 31, 7], [17, 3], [250, 2, 2, 90, 41, 6, 11, 8]]

_ON_EMBEDDING = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
_SAVED_NORM = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
_TOKENS = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 9, 31, 250])
_HEAD = {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}

# name → model type, changes of its config, the adapter's config
CASES: dict[str, tuple[str, dict[str, Any], peft.PeftConfig]] = {
    "embedding": ("llama", {}, _ON_EMBEDDING),
    "embedding alone": ("llama", {}, peft.LoraConfig(r=4, target_modules=["embed_tokens"])),
    "embedding, tied": ("llama", {"tie_word_embeddings": True}, _ON_EMBEDDING),
    "embedding, scaled": ("gemma", {}, _ON_EMBEDDING),
    "embedding, scaled in its module": ("gemma3_text", {}, _ON_EMBEDDING),
    "embedding and positions of gpt2": (
        "gpt2",
        {},
        peft.LoraConfig(r=4, target_modules=["wte", "wpe", "c_attn"], fan_in_fan_out=True),
    ),
    "embedding table": (
        "llama",
        {},
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "embedding table, tied": (
        "llama",
        {"tie_word_embeddings": True},
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "embedding table, scaled in its module": (
        "gemma3_text",
        {},
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "head": ("llama", {}, peft.LoraConfig(**_HEAD)),
    "head with a bias": ("phi", {}, peft.LoraConfig(**_HEAD)),
    "token rows": ("llama", {}, _TOKENS),
    "token rows, tied": ("llama", {"tie_word_embeddings": True}, _TOKENS),
    "token rows, scaled": ("gemma3_text", {}, _TOKENS),
    "norm": ("llama", {}, _SAVED_NORM),
    "norm of gemma": ("gemma", {}, _SAVED_NORM),
    "norms of heads": (
        "qwen3",
        {},
        peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["q_norm", "k_norm"]),
    ),
    "norms of heads behind the transposition": (
        "gemma3_text",
        {},
        peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["q_norm", "k_norm"]),
    ),
    "norms with biases": (
        "gpt2",
        {},
        peft.LoraConfig(
            r=4, target_modules=["c_attn"], modules_to_save=["ln_1", "ln_f"], fan_in_fan_out=True
        ),
    ),
    "all norms with biases": (
        "phi",
        {},
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            modules_to_save=["input_layernorm", "final_layernorm"],
            bias="all",
        ),
    ),
}


def _model(case: str) -> PreTrainedModel:
    model_type, changes, _ = CASES[case]
    return tiny_model(model_type, **changes)


@pytest.mark.parametrize(
    "fuse", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["fused", "modules"]
)
@pytest.mark.parametrize("case", CASES)
def test_its_rows_answer_as_peft_does_and_the_others_keep_their_bits(
    case: str, fuse: bool, tmp_path: Path
) -> None:
    model = _model(case)
    adapter = peft_adapter(model, CASES[case][2], tmp_path, std=0.3)
    leaves = ("c_fc",) if model.config.model_type == "gpt2" else ("q_proj",)
    other = lora_plan(model, rank=4, seed=7, leaves=leaves)
    plans: list[AdapterPlan | None] = [None, adapter.plan, other, adapter.plan, adapter.plan]
    prompts = [PROMPTS[0], *PROMPTS[:2], PROMPTS[0], PROMPTS[2]]
    with running_engine(model, fuse=fuse, max_step_tokens=9) as engine:
        together = generate_all(engine, prompts, SAMPLING, plans)
        alone = generate_all(engine, [PROMPTS[0]], SAMPLING)[0]
    for prompt, plan, answer in zip(prompts, plans, together, strict=True):
        if plan is adapter.plan:
            _check(adapter, prompt, answer)
    assert _logprobs(together[0]) == _logprobs(alone), "the base's row has other bits"
    assert _logprobs(together[0]) != _logprobs(together[3]), "the adapter does nothing"


def _check(adapter: PeftAdapter, prompt: list[int], answer: Answer) -> None:
    tokens, logprobs = adapter.greedy(prompt, N_TOKENS)
    assert answer.token_ids == tokens
    assert _logprobs(answer) == pytest.approx(logprobs, abs=1e-4)


def _logprobs(answer: Answer) -> list[float]:
    def of(event: TokenEvent) -> list[float]:
        return [entry.logprob for entry in event.logprobs]

    return [logprob for event in answer.events for logprob in of(event)]


@pytest.mark.parametrize("case", ["embedding", "norm", "token rows, tied", "head"])
def test_log_probabilities_of_the_prompt_are_pefts(case: str, tmp_path: Path) -> None:
    model = _model(case)
    adapter = peft_adapter(model, CASES[case][2], tmp_path, std=0.3)
    prompt = PROMPTS[2]
    sampling = replace(SAMPLING, prompt_logprobs=0)
    with running_engine(model) as engine:
        answer = generate_all(engine, [prompt], sampling, [adapter.plan])[0]
    with torch.no_grad():
        table = torch.log_softmax(adapter.model(input_ids=torch.tensor([prompt])).logits[0], -1)
    found = [entry.logprob for entry in answer.events[0].prompt_logprobs if entry is not None]
    wanted = [float(table[at, token]) for at, token in enumerate(prompt[1:])]
    assert found == pytest.approx(wanted, abs=1e-4)
