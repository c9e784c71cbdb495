"""The papers' relative claims on the default base, at equal parameters; resumable, CPU-sized.

    python -m research.routing.relative_claims run      # trains what relative_claims.json lacks
    python -m research.routing.relative_claims table    # prints the tables

MixLoRA: LoRA r=6 on all linears (1.83 M parameters) against MixLoRA with 4 experts of r=2, top-2
(1.82 M), each on one task at a time (single) and on all four mixed (mixed; four times the steps,
so that each task is seen as often). Claim: mixing costs LoRA more than MixLoRA.

Block-LoRA: LoRA r=8, LoRA r=2, and Block-LoRA r=8 in 4 blocks on both axes, on one task at a time.
Claim: as good as LoRA r=8 with fewer parameters. On the rank axis it is a LoRA of rank 2 whose B
moves four times as far in a step, so lora-r2-b4 (rank 2, four times the rate for B) stands beside.

Scores are exact match of greedy answers (all answer tokens right under teacher forcing, which is
the same thing) and the answer's loss, on held-out inputs with wordings that training never has.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loraplex_server.model.loading.pull import resolve_model
from loraplex_training.attached import Attached
from loraplex_training.batches import IGNORED, batch_of, endless, grouped
from loraplex_training.block_lora import BlockLora
from loraplex_training.config import AdapterShape, BlockShape, ExpertShape
from loraplex_training.examples import Example, tokenise
from loraplex_training.mixlora import MixLora
from loraplex_training.shared_prefix import logits_at, shared_prefix_len
from research.zoo.chores import chats

RESULTS = Path(__file__).with_name("relative_claims.json")
TASKS = ("date.de/sentence", "initials/tag", "list-reverse/quotes", "minutes/plain")
SEEDS = (0, 1, 2)
STEPS = 25  # of one task
BATCH_TOKENS = 512
LR = 2e-3
N_TRAIN, N_TEST = 300, 48


@dataclass(frozen=True)
class Cell:
    method: str
    data: str  # a task, or "mixed"
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}|{self.data}|{self.seed}"


def cells() -> Iterator[Cell]:
    """Seed by seed, so that an interrupted run has whole seeds."""
    for seed in SEEDS:
        for method in ("lora-r6", "mixlora-4x2"):
            for data in (*TASKS, "mixed"):
                yield Cell(method, data, seed)
    for seed in SEEDS:
        for method in ("lora-r8", "lora-r2", "lora-r2-b4", "block-rank-8/4", "block-feature-8/4"):
            for data in TASKS[:2]:
                yield Cell(method, data, seed)


def attach(model: nn.Module, method: str) -> nn.Module:
    if method.startswith("lora-r"):
        from peft import LoraConfig, get_peft_model

        rank = lora_rank(method)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
        return get_peft_model(model, config)
    if method == "mixlora-4x2":
        routed = AdapterShape("mixlora", rank=2, alpha=4.0, experts=ExpertShape(4, 2))
        return Attached(model, lambda base: MixLora(base, routed))
    blocks = BlockShape(4, method.split("-")[1])
    shape = AdapterShape("block-lora", rank=8, alpha=16.0, blocks=blocks)
    return Attached(model, lambda base: BlockLora(base, shape))


def lora_rank(method: str) -> int:
    return int(method.removeprefix("lora-r").removesuffix("-b4"))


def rate_of_b(method: str) -> float:
    """How many times the rate of A it is."""
    return 4.0 if method.endswith("-b4") else 1.0


class Lab:
    """The tokenised data of all tasks, and the base to start from."""

    def __init__(self) -> None:
        self.base = resolve_model()
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.pad_id = tokenizer.pad_token_id or 0

        def examples(task: str, split: str, n: int) -> list[Example]:
            found = chats((task,), split, n)
            return [
                tokenise(chat["messages"], tokenizer, max_len=256, where=task) for chat in found
            ]

        self.train = {task: examples(task, "train", N_TRAIN) for task in TASKS}
        self.test = {task: examples(task, "test", N_TEST) for task in TASKS}

    def run(self, cell: Cell) -> dict[str, object]:
        tasks = TASKS if cell.data == "mixed" else (cell.data,)
        examples = [example for task in tasks for example in self.train[task]]
        torch.manual_seed(cell.seed)
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16)
        model = attach(model, cell.method)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        times = rate_of_b(cell.method)
        groups = [
            {"params": [p], "times": times if "lora_B" in name else 1.0}
            for name, p in trained.items()
        ]
        steps = STEPS * len(tasks)
        self._train(model, groups, examples, steps, cell.seed)
        return {
            **asdict(cell),
            "steps": steps,
            "n_parameters": sum(p.numel() for p in trained.values()),
            "scores": {task: self._score(model, self.test[task]) for task in tasks},
        }

    def _train(
        self,
        model: nn.Module,
        groups: list[dict[str, object]],
        examples: list[Example],
        steps: int,
        seed: int,
    ) -> None:
        n_shared = shared_prefix_len(examples)
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        batches = endless([len(e) for e in examples], BATCH_TOKENS, seed)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:  # warm-up, then linear to a tenth
                rate = LR * group["times"]
                group["lr"] = rate * min((step + 1) / 5, 1.0 - 0.9 * step / steps)
            loss, _, _ = self._loss(model, [examples[i] for i in next(batches)], n_shared)
            if hasattr(model, "auxiliary_loss"):
                loss = loss + model.auxiliary_loss()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def _score(self, model: nn.Module, examples: list[Example]) -> dict[str, float]:
        model.eval()
        n_shared = shared_prefix_len(examples)
        total, n_tokens, n_exact = 0.0, 0, 0
        for group in grouped([len(e) for e in examples], BATCH_TOKENS):
            loss, count, exact = self._loss(model, [examples[i] for i in group], n_shared)
            total += float(loss) * count
            n_tokens += count
            n_exact += exact
        return {"exact": n_exact / len(examples), "loss": total / n_tokens}

    def _loss(
        self, model: nn.Module, examples: list[Example], n_shared: int
    ) -> tuple[torch.Tensor, int, int]:
        """Mean loss of the answers' tokens, how many, and how many answers are right whole."""
        batch = batch_of(examples, self.pad_id, "cpu")
        wanted = (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_at(model, batch, wanted, n_shared)
        logits, labels = logits.float(), batch.labels[:, wanted]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )
        learnt = labels != IGNORED
        right = ((logits.argmax(-1) == labels) | ~learnt).all(dim=1)
        return loss, int(learnt.sum()), int(right.sum())


def run() -> None:
    torch.set_num_threads(1)
    results = _load()
    lab = Lab()
    for cell in cells():
        if cell.key in results:
            continue
        started = time.monotonic()
        results[cell.key] = lab.run(cell)
        fresh = RESULTS.with_suffix(".new")
        fresh.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(fresh, RESULTS)
        scores = results[cell.key]["scores"]
        print(f"{cell.key}: {scores} ({time.monotonic() - started:.0f} s)", flush=True)


def table() -> None:
    results = list(_load().values())
    columns = ("method", "parameters", "served MFLOP/token", "data", "seeds", *TASKS, "mean exact")
    print("| " + " | ".join((*columns, "loss")) + " |")
    print("|" + "---|" * (len(columns) + 1))
    methods = dict.fromkeys(r["method"] for r in results)
    for method in methods:
        for data in ("single", "mixed"):
            rows = [
                r
                for r in results
                if r["method"] == method and (r["data"] == "mixed") == (data == "mixed")
            ]
            if rows:
                print(_row(method, data, rows))


def _row(method: str, data: str, rows: list[dict]) -> str:
    seeds = sorted({r["seed"] for r in rows})
    by_task: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    for r in rows:
        for task, score in r["scores"].items():
            by_task[task].append(score)
    shown = [
        f"{statistics.mean(s['exact'] for s in scores):.1%}" if scores else "–"
        for scores in by_task.values()
    ]
    flat = [score for scores in by_task.values() for score in scores]
    per_seed = [
        statistics.mean(s["exact"] for r in rows if r["seed"] == seed for s in r["scores"].values())
        for seed in seeds
    ]
    spread = f" ± {statistics.stdev(per_seed):.1%}" if len(per_seed) > 1 else ""
    mean = f"{statistics.mean(per_seed):.1%}{spread}"
    loss = f"{statistics.mean(s['loss'] for s in flat):.3f}"
    n = f"{rows[0]['n_parameters'] / 1e6:.2f} M"
    flops = f"{served_flops(method) / 1e6:.2f}"
    cells = (method, n, flops, data, str(len(seeds)), *shown, mean, loss)
    return "| " + " | ".join(cells) + " |"


def served_flops(method: str) -> int:
    """Of the adapter, per token, as it is served: two per factor element that a token passes.

    Block-LoRA is folded first: to rank r/n on the rank axis, to rank r on the feature axis.
    MixLoRA: attention at its rank, the gate, and top_k experts of the MLP.
    """
    config = AutoConfig.from_pretrained(resolve_model())
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    attention = 4 * hidden + 2 * (hidden + kv)  # inputs + outputs of q, o and of k, v
    mlp = 3 * (hidden + inner)
    if method == "mixlora-4x2":
        layer = 2 * attention + 4 * hidden + 2 * (2 * mlp)
    else:
        rank = {"block-rank-8/4": 2, "block-feature-8/4": 8}.get(method)
        layer = (rank or lora_rank(method)) * (attention + mlp)
    return int(2 * config.num_hidden_layers * layer)


def _load() -> dict[str, dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    {"run": run, "table": table}[parser.parse_args().command]()
