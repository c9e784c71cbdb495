"""Reinforcement learning with the server as the sampler.

Each step draws answers from the server through the adapter `policy`, rewards them, makes one step
of REINFORCE on a LoRA here, and pushes the new weights. The server replaces the adapter between two
requests; those that run keep the weights that they began with.

    python examples/rl_loop.py --steps 20 --out policy
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraplex_server.model.loading.pull import resolve_model

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("LORAPLEX_API_KEY", "none")
PROMPTS = ["How are you?", "What is the sea?", "Tell me about cats.", "Where is Rome?"]
ANSWERS = 4  # of each prompt, each step
client = httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {KEY}"}, timeout=600)


def reward(answer: str) -> float:
    """Short answers that end in an exclamation mark."""
    return float(answer.rstrip().endswith("!")) + answer.count("!") / (1 + len(answer.split()))


def sample(prompt: str, adapter: str | None, seed: int) -> tuple[list[int], list[dict[str, Any]]]:
    """The prompt's token ids, and the choices with theirs."""
    messages = [{"role": "user", "content": prompt}]
    tokens = client.post("/tokenize", json={"messages": messages})
    tokens.raise_for_status()
    body = {
        "messages": messages,
        "n": ANSWERS,
        "max_tokens": 24,
        "temperature": 1,
        "seed": seed,
        "return_token_ids": True,
        **({"adapter": adapter} if adapter else {}),
    }
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return tokens.json()["tokens"], answer.json()["choices"]


def push(folder: Path, etag: str | None) -> str:
    """Replaces the weights that we pushed last, and nobody else's; the new ETag."""
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    headers = {"If-None-Match": "*"} if etag is None else {"If-Match": etag}
    answer = client.put("/v1/adapters/policy", files=files, headers=headers)
    if answer.is_error:
        raise SystemExit(answer.text)
    return answer.headers["etag"]


def log_probability(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Of the whole answer, given the prompt."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(answer)[:, None]
    return logits.log_softmax(-1).gather(1, chosen).sum()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("policy"))
    parser.add_argument("--base", help="what the server serves: a pulled name, or a folder")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = resolve_model(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)

    adapter, etag = None, None  # the first answers are the base's: a new LoRA changes nothing
    for step in range(arguments.steps):
        total = 0.0
        optimizer.zero_grad()
        for number, text in enumerate(PROMPTS):
            prompt, choices = sample(text, adapter, seed=step * len(PROMPTS) + number)
            rewards = [reward(choice["message"]["content"]) for choice in choices]
            mean = sum(rewards) / len(rewards)
            total += mean / len(PROMPTS)
            for choice, earned in zip(choices, rewards, strict=True):
                loss = -(earned - mean) * log_probability(model, prompt, choice["token_ids"])
                (loss / (len(PROMPTS) * ANSWERS)).backward()
        optimizer.step()
        model.save_pretrained(arguments.out)
        etag = push(arguments.out, etag)
        adapter = "policy"
        print(f"step {step}: mean reward {total:.3f}, policy is {etag}", flush=True)


if __name__ == "__main__":
    main()
