"""GRPO of TRL with the server as the sampler.

TRL trains a LoRA here. Before each generation the script pushes the new weights to the server. The
server answers once they are warm and keeps the two contents before, so requests that run end on the
weights that they began with. Ten steps take some minutes on two cores.

    pip install trl peft httpx
    python examples/trl_grpo.py --base HuggingFaceTB/SmolLM2-135M-Instruct --out policy
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import httpx
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

URL = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("LORAPLEX_API_KEY", "none")
PROMPTS = ["Tell me about cats.", "What is the sea?"]
ANSWERS = 8  # of each prompt, each step
client = httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {KEY}"}, timeout=600)


def reward(completions: list[Any], **fields: Any) -> list[float]:
    """Return the share of short words, of at most three letters, in each answer."""
    words = [re.findall(r"\w+", completion[0]["content"]) for completion in completions]
    return [sum(len(word) <= 3 for word in each) / max(1, len(each)) for each in words]


class Rollouts:
    """Draws answers from the server, by the weights that the trainer has now."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._step, self._seed = folder, -1, 0

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """Return the tokens and log-probabilities of an answer to each prompt."""
        if trainer.state.global_step != self._step:
            self._push(trainer)
        drawn = [self._draw(prompt, trainer) for prompt in prompts]
        return {
            "prompt_ids": [ids for ids, _ in drawn],
            "completion_ids": [choice["token_ids"] for _, choice in drawn],
            "logprobs": [
                [token["logprob"] for token in choice["logprobs"]["content"]] for _, choice in drawn
            ],
        }

    def _push(self, trainer: GRPOTrainer) -> None:
        self._step = trainer.state.global_step
        if self._step == 0:
            return  # a LoRA that has made no step is the base, which the server refuses as one
        trainer.model.save_pretrained(self._folder)
        files = {
            "config": (self._folder / "adapter_config.json").read_bytes(),
            "weights": (self._folder / "adapter_model.safetensors").read_bytes(),
        }
        params = {"retain": 2, "warm": True}
        client.put("/v1/adapters/policy", files=files, params=params).raise_for_status()

    def _draw(self, messages: Any, trainer: GRPOTrainer) -> tuple[list[int], dict[str, Any]]:
        self._seed += 1
        tokens = client.post("/tokenize", json={"messages": messages})
        tokens.raise_for_status()
        body = {
            "messages": messages,
            "max_tokens": trainer.args.max_completion_length,
            "temperature": 1,
            "seed": self._seed,
            "logprobs": True,
            "return_token_ids": True,
            **({"adapter": "policy"} if self._step > 0 else {}),
        }
        answer = client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return tokens.json()["tokens"], answer.json()["choices"][0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True, help="what the server serves: a name or a folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("policy"))
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    options = GRPOConfig(
        output_dir=str(arguments.out / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=len(PROMPTS) * ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=16,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.base, dtype="float32"),
        reward,
        options,
        train_dataset=Dataset.from_list(prompts * arguments.steps),
        processing_class=AutoTokenizer.from_pretrained(arguments.base),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
        rollout_func=Rollouts(arguments.out),
    )
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"mean reward of the first three steps {sum(rewards[:3]) / 3:.3f}, ", end="")
    print(f"of the last three {sum(rewards[-3:]) / 3:.3f}")
    card = client.get("/v1/adapters/policy").raise_for_status().json()
    print(f"policy has revision {card['revision']}")


if __name__ == "__main__":
    main()
