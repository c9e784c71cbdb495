"""Compares the answers of a mixed batch with those of PEFT, which runs each adapter alone.

In float32: eight adapters of assorted ranks and targets, a base request between each two, all
asked at once and decoded greedily.
"""

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from loadtests.random_adapters import ALL_LINEARS, write_lora
from loadtests.systems import System, started

_N_TOKENS = 16
_ADAPTERS = (  # (rank, targets)
    (4, ("q_proj", "v_proj")),
    (8, ALL_LINEARS),
    (16, ("gate_proj", "up_proj", "down_proj")),
    (32, ("q_proj", "k_proj", "v_proj", "o_proj")),
    (1, ("o_proj",)),
    (64, ("q_proj",)),
    (2, ALL_LINEARS),
    (12, ("down_proj",)),
)
_STD = 0.05  # of the factors: enough for each adapter to change the answer
_PROMPTS = (
    "The three primary colours are",
    "My favourite thing about the sea is",
    "To make a good cup of tea, you should",
    "The capital of France is",
    "In the beginning there was",
    "A list of animals:",
    "She opened the door and saw",
    "Water boils when",
)


@dataclass(frozen=True)
class Expected:
    """PEFT's answer for one adapter and prompt; an adapter of None is the base."""

    adapter: str | None
    prompt: str
    text: str
    first_logprob: float  # of the first greedy token


def check_outputs(
    systems: Sequence[System], model: Path, work: Path
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, for each system, the rows and the wrong texts of base and adapters."""
    folders = [
        write_lora(
            model, work / "assorted" / f"a{index}", rank=rank, seed=index, targets=targets, std=_STD
        )
        for index, (rank, targets) in enumerate(_ADAPTERS)
    ]
    disable_progress_bar()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of PEFT's
        expected = _expected_answers(model, folders)
    found = {}
    for system in systems:
        with started(system, model, folders, work, dtype="float32") as target:
            answers = _ask_all(system, target.url, expected)
        found[system.name] = {
            "base_rows": _compare(expected, answers, base=True),
            "adapter_rows": _compare(expected, answers, base=False),
        }
    return found


def _expected_answers(model: Path, folders: Sequence[Path]) -> list[Expected]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for folder, prompt in zip(folders, _PROMPTS, strict=True):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        base.generation_config.eos_token_id = None  # as ignore_eos: a token like any other
        found.append(_answer(base, tokenizer, None, prompt))
        adapted = PeftModel.from_pretrained(base, folder).eval()
        found.append(_answer(adapted, tokenizer, folder.name, prompt))
    return found


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, adapter: str | None, prompt: str) -> Expected:
    ids = tokenizer(prompt, return_tensors="pt")
    logprobs = torch.log_softmax(model(**ids).logits[0, -1].float(), -1)
    output = model.generate(**ids, max_new_tokens=_N_TOKENS, do_sample=False)
    new = output[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Expected(adapter, prompt, text, float(logprobs[new[0]]))


def _ask_all(system: System, url: str, expected: Sequence[Expected]) -> list[Mapping[str, Any]]:
    """Send all requests at once and return the answers in their order."""

    def ask(want: Expected) -> Mapping[str, Any]:
        body = {
            "prompt": want.prompt,
            "max_tokens": _N_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            **system.body("lora", want.adapter),
        }
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
        response.raise_for_status()
        answer: Mapping[str, Any] = response.json()
        return answer

    with ThreadPoolExecutor(len(expected)) as pool:
        return list(pool.map(ask, expected))


def _compare(
    expected: Sequence[Expected], answers: Sequence[Mapping[str, Any]], *, base: bool
) -> dict[str, Any]:
    rows = [
        (want, answer["choices"][0])
        for want, answer in zip(expected, answers, strict=True)
        if (want.adapter is None) is base
    ]
    return {
        "n": len(rows),
        "wrong_texts": sum(choice["text"] != want.text for want, choice in rows),
        "worst_first_token_logprob_error": max(
            abs(_first_logprob(choice) - want.first_logprob) for want, choice in rows
        ),
    }


def _first_logprob(choice: Mapping[str, Any]) -> float:
    logprobs = choice["logprobs"]
    if "token_logprobs" in logprobs:
        return float(logprobs["token_logprobs"][0])
    return float(logprobs["content"][0]["logprob"])  # llama.cpp answers in the chat shape
