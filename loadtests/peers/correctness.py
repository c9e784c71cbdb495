"""Does a mixed batch give each request its own adapter's answer? PEFT, run alone, is the judge."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .systems import System

__all__ = ["Expected", "check_mixed_batch", "expected_answers"]

N_TOKENS = 16
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
    """What PEFT says for one (adapter, prompt): adapter None is the base."""

    adapter: int | None
    prompt: str
    text: str
    first_logprob: float  # of the first greedy token


def expected_answers(model: Path, adapters: Sequence[Path]) -> list[Expected]:
    """Every adapter and the base on its own prompt, base rows between the adapters' rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for index in range(len(adapters)):
        prompt = _PROMPTS[index % len(_PROMPTS)]
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        found.append(_answer(base, tokenizer, None, prompt))
        adapted = PeftModel.from_pretrained(base, adapters[index]).eval()
        found.append(_answer(adapted, tokenizer, index, prompt))
    return found


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, adapter: int | None, prompt: str) -> Expected:
    ids = tokenizer(prompt, return_tensors="pt")
    logprobs = torch.log_softmax(model(**ids).logits[0, -1].float(), -1)
    output = model.generate(
        **ids, max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, do_sample=False
    )
    new = output[0, ids["input_ids"].shape[1] :]
    return Expected(adapter, prompt, tokenizer.decode(new), float(logprobs[new[0]]))


def check_mixed_batch(system: System, url: str, expected: Sequence[Expected]) -> dict[str, Any]:
    """All requests at once; counts the wrong ones, base and adapter rows apart."""
    answers = asyncio.run(_ask_all(system, url, expected))
    rows: dict[str, dict[str, Any]] = {}
    for kind, is_base in (("base_rows", True), ("adapter_rows", False)):
        pairs = [
            (want, got)
            for want, got in zip(expected, answers, strict=True)
            if (want.adapter is None) == is_base
        ]
        errors = [abs(_logprob(got) - want.first_logprob) for want, got in pairs]
        rows[kind] = {
            "n": len(pairs),
            "wrong_texts": sum(_text(got) != want.text for want, got in pairs),
            "worst_first_token_logprob_error": max(errors, default=0.0),
        }
    return rows


async def _ask_all(
    system: System, url: str, expected: Sequence[Expected]
) -> list[Mapping[str, Any]]:
    async with httpx.AsyncClient(timeout=600) as client:

        async def ask(want: Expected) -> Mapping[str, Any]:
            body = {
                "prompt": want.prompt,
                "max_tokens": N_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 1,
                **system.body(want.adapter),
            }
            response = await client.post(f"{url}/v1/completions", json=body)
            response.raise_for_status()
            answer: Mapping[str, Any] = response.json()
            return answer

        return await asyncio.gather(*(ask(want) for want in expected))


def _text(answer: Mapping[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def _logprob(answer: Mapping[str, Any]) -> float:
    logprobs = answer["choices"][0]["logprobs"]
    if "token_logprobs" in logprobs:
        return float(logprobs["token_logprobs"][0])
    return float(logprobs["content"][0]["logprob"])  # llama.cpp answers in the chat shape
