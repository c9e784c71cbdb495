"""A trainer of its own, as TRL's GRPO: it pushes weights, and takes rollouts from the server."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.servers.server_process import server_process

_PROMPT, _N_TOKENS, _GROUP = [40, 41], 4, 64


@pytest.mark.parametrize("push", ["put", "load_inplace"])
def test_a_trainer_that_pushes_its_weights_improves_a_toy_reward(
    push: str, tiny_base: Path, tmp_path: Path
) -> None:
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"),
    )
    optimiser = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    flags = ("--adapters-dir", adapters)
    with (
        server_process(tiny_base, tmp_path / "state", *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        send = {"put": _put, "load_inplace": _load_inplace}[push]
        means, digest = [], None
        for number in range(12):
            rollouts = _rollouts(client, number, digest)
            tokens = torch.tensor([each["token_ids"] for each in rollouts])
            old = torch.tensor([each["logprobs"]["token_logprobs"] for each in rollouts])
            rewards = (tokens % 2).float().mean(1)
            means.append(rewards.mean().item())
            now = _logprobs(policy, tokens)
            assert torch.allclose(now, old, atol=5e-3)  # the server's policy is the trainer's
            gain = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            loss = -((now - old).exp() * gain[:, None]).sum(1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()
            policy.save_pretrained(tmp_path / "saved")
            digest = send(client, tmp_path / "saved", adapters)
        revisions = client.get("/v1/adapters/policy/revisions").json()["data"]
    assert means[0] < 0.6
    assert means[-1] > 0.85
    assert len(revisions) == {"put": 1 + 1, "load_inplace": 1 + 3}[push]


def _put(client: httpx.Client, saved: Path, _: Path) -> str:
    files = {
        "config": (saved / "adapter_config.json").read_bytes(),
        "weights": (saved / "adapter_model.safetensors").read_bytes(),
    }
    options = {"retain": 1, "warm": True}
    answer = client.put("/v1/adapters/policy", files=files, params=options)
    assert answer.is_success, answer.text
    assert answer.json()["tier"] != "disk"
    return str(answer.json()["digest"])


def _load_inplace(client: httpx.Client, saved: Path, adapters: Path) -> str:
    """Push as TRL's client of vLLM does: through a folder that both sides see."""
    shutil.copytree(saved, adapters / "pushed", dirs_exist_ok=True)
    body = {"lora_name": "policy", "lora_path": str(adapters / "pushed"), "load_inplace": True}
    answer = client.post("/v1/load_lora_adapter", json=body)
    assert answer.is_success, answer.text
    return str(client.get("/v1/adapters/policy").json()["digest"])


def _rollouts(client: httpx.Client, seed: int, digest: str | None) -> list[dict[str, Any]]:
    body = {
        "prompt": _PROMPT,
        "n": _GROUP,
        "max_tokens": _N_TOKENS,
        "temperature": 1.0,
        "seed": seed,
        "logprobs": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    if digest is not None:
        body["adapter"] = "policy"
    answer = client.post("/v1/completions", json=body)
    assert answer.is_success, answer.text
    if digest is not None:  # the version of the policy, of every token of the answer
        assert answer.json()["adapter"]["digest"] == digest
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def _logprobs(policy: PeftModel, tokens: Tensor) -> Tensor:
    """Return the policy's log-probabilities of answers [n, n_tokens]."""
    texts = torch.cat([torch.tensor([_PROMPT]).expand(len(tokens), -1), tokens], 1)
    logits = policy(texts).logits[:, len(_PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
