"""A mixed batch gives, row by row, what PEFT gives when it runs that adapter alone."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from tests.support.bases.architectures import VOCAB_SIZE, tiny_model
from tests.support.bases.tiny_models import read_path
from tests.support.servers.engines import GREEDY, Answer, generate_all, running_engine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on configs

_N_TOKENS = 64

# name → LoraConfig fields: ranks, scales and targets all differ
_LLAMA: dict[str, dict[str, Any]] = {
    "r1-q": {"r": 1, "target_modules": ["q_proj"]},
    "r4-qv": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "r8-all": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "r16-mlp": {"r": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "r17-rslora": {"r": 17, "use_rslora": True, "target_modules": ["k_proj", "o_proj"]},
    "r40-all": {"r": 40, "lora_alpha": 20, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 9, "layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "one-layer": {"r": 6, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "regex": {"r": 5, "target_modules": r".*\.(0|2)\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "bias": {"r": 4, "lora_bias": True, "target_modules": ["o_proj", "gate_proj"]},
    "head": {"r": 3, "target_modules": ["q_proj", "lm_head"]},
}
_GPT2: dict[str, dict[str, Any]] = {
    "attn": {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "proj": {"r": 7, "target_modules": ["c_proj"], "fan_in_fan_out": True},
    "all": {"r": 3, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
}


class _Oracle:
    """PEFT with every adapter loaded, run one at a time."""

    def __init__(self, model: PreTrainedModel, folder: Path, adapters: dict[str, Any]) -> None:
        self.base = model
        self.plans: dict[str, AdapterPlan | None] = {"": None}
        self._peft: dict[str, PeftModel] = {}
        self._answers: dict[tuple[str, tuple[int, ...]], tuple[list[int], Tensor]] = {}
        for index, (name, fields) in enumerate(adapters.items()):
            torch.manual_seed(100 + index)
            config = LoraConfig(**({"lora_alpha": 12, "task_type": "CAUSAL_LM"} | fields))
            peft = get_peft_model(copy.deepcopy(model), config).eval()
            with torch.no_grad():
                for key, parameter in peft.named_parameters():
                    if "lora_" in key:
                        parameter.copy_(0.2 * torch.randn_like(parameter))
                    if "magnitude" in key:
                        parameter.copy_(1.0 + 0.3 * torch.rand_like(parameter))
            peft.save_pretrained(folder / name)
            self._peft[name] = peft
            self.plans[name] = read_path(folder / name, model).plan

    def greedy(self, name: str, prompt: list[int]) -> tuple[list[int], Tensor]:
        """The greedy continuation and log-probabilities [n_tokens, vocab_size] along it."""
        key = (name, tuple(prompt))
        if key not in self._answers:
            self._answers[key] = self._run(name, prompt)
        return self._answers[key]

    def _run(self, name: str, prompt: list[int]) -> tuple[list[int], Tensor]:
        model = self._peft.get(name, self.base)
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=_N_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            logits = model(input_ids=output).logits[0, len(prompt) - 1 : -1]
        return output[0, len(prompt) :].tolist(), torch.log_softmax(logits.float(), -1)


@pytest.fixture(
    scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.nightly), "gpt2"]
)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Oracle:
    adapters = _GPT2 if request.param == "gpt2" else _LLAMA
    return _Oracle(tiny_model(request.param), tmp_path_factory.mktemp(request.param), adapters)


def _prompts(n: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(5)
    for index in range(n):
        yield torch.randint(VOCAB_SIZE, (5 + 7 * index % 40,), generator=generator).tolist()


def _check(
    oracle: _Oracle, names: list[str], prompts: list[list[int]], found: list[Answer]
) -> None:
    for name, prompt, answer in zip(names, prompts, found, strict=True):
        token_ids, logprobs = oracle.greedy(name, prompt)
        assert answer.token_ids == token_ids, f"{name or 'base'} answers differently"
        for position, event in enumerate(answer.events):
            (entry,) = event.logprobs
            tokens, values = zip(*entry.top, strict=True)
            row = torch.full((VOCAB_SIZE,), float("nan"))
            row[list(tokens)] = torch.tensor(values)
            assert (row - logprobs[position]).abs().max() <= 1e-4, f"{name or 'base'} @{position}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_step_tokens": 16},  # chunked prefill forced small
        {"kv_memory_bytes": 30 * 12288, "max_step_tokens": 64},  # not enough pages: preemption
        {"fuse": False},
        {"prefix_cache": False},
    ],
    ids=["plain", "small-chunks", "preemption", "modules", "no-prefix-cache"],
)
def test_every_row_of_a_mixed_batch_equals_peft_alone(
    oracle: _Oracle, changes: dict[str, Any]
) -> None:
    # base rows stand between adapter rows: they are checked as strictly
    names = [name for adapter in list(oracle.plans)[1:] for name in (adapter, "")]
    prompts = list(_prompts(len(names)))
    sampling = replace(GREEDY, max_tokens=_N_TOKENS, logprobs=VOCAB_SIZE)
    with running_engine(oracle.base, **changes) as engine:
        plans = [oracle.plans[name] for name in names]
        answers = generate_all(engine, prompts, sampling, plans)
        if "kv_memory_bytes" in changes:
            assert engine.stats().n_preemptions > 0
        _check(oracle, names, prompts, answers)
        if changes:
            return
        again = generate_all(engine, prompts, sampling, plans)
        assert engine.stats().prefix_hits > 0
        _check(oracle, names, prompts, again)


def test_one_prompt_through_every_adapter_shares_no_prefix(oracle: _Oracle) -> None:
    """The same 40 tokens under each adapter: a cache that mixed them would answer wrongly."""
    prompt = list(range(1, 41))
    names = [*oracle.plans, *oracle.plans]
    sampling = replace(GREEDY, max_tokens=_N_TOKENS, logprobs=VOCAB_SIZE)
    with running_engine(oracle.base, max_batch_size=3, kv_memory_bytes=4 << 20) as engine:
        plans = [oracle.plans[name] for name in names]
        answers = generate_all(engine, [prompt] * len(names), sampling, plans)
        assert engine.stats().prefix_hits > 0  # within one adapter prefixes are shared
    _check(oracle, names, [prompt] * len(names), answers)
