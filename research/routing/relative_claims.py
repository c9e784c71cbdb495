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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loraplex_server.model.loading.pull import resolve_model
from loraplex_training.batches import endless
from loraplex_training.config import AdapterShape, BlockShape, ExpertShape
from loraplex_training.engine.adapter import Adam, LearningAdapter
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.examples import tokenise
from loraplex_training.families.table import lora_shape, new_adapter
from loraplex_training.recipes.recipe import Recipe, RecipeAdapter, Start
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


def lora_rank(method: str) -> int:
    return int(method.removeprefix("lora-r").removesuffix("-b4"))


def shape_of(method: str) -> AdapterShape:
    if method.startswith("lora-r"):
        rank = lora_rank(method)
        return AdapterShape(rank=rank, alpha=2.0 * rank)
    if method == "mixlora-4x2":
        return AdapterShape("mixlora", rank=2, alpha=4.0, experts=ExpertShape(4, 2))
    blocks = BlockShape(4, method.split("-")[1])
    return AdapterShape("block-lora", rank=8, alpha=16.0, blocks=blocks)


def _four_times_b(adapter: RecipeAdapter, adam: Adam) -> float:
    before = {name: part["B"].detach().clone() for name, part in adapter.parts.items()}
    norm = adapter.adam_step(adam)
    for name, part in adapter.parts.items():
        part["B"].data.lerp_(before[name], -3.0)
    return norm


class Lab:
    """The tokenised data of all tasks, and the engine that trains."""

    def __init__(self) -> None:
        folder = resolve_model()
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def data(task: str, split: str, n: int) -> list[Datum]:
            examples = [
                tokenise(chat, tokenizer, max_len=256, where=task)
                for chat in chats((task,), split, n)
            ]
            return [Datum.of_chat(each.tokens, each.learn) for each in examples]

        self.train = {task: data(task, "train", N_TRAIN) for task in TASKS}
        self.test = {task: data(task, "test", N_TEST) for task in TASKS}
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = FrozenModel(base.config, ModelWeights(base), dtype=torch.bfloat16)
        self.engine = TrainingEngine(model)

    def run(self, cell: Cell) -> dict[str, object]:
        tasks = TASKS if cell.data == "mixed" else (cell.data,)
        data = [datum for task in tasks for datum in self.train[task]]
        shape = shape_of(cell.method)
        adapter = new_adapter(self.engine, shape, cell.seed, data)
        if cell.method.endswith("-b4"):
            start = Start(self.engine.model, lora_shape(shape), cell.seed)
            adapter = RecipeAdapter(Recipe(optimiser=_four_times_b), start)
        steps = STEPS * len(tasks)
        batches = endless([len(datum) for datum in data], BATCH_TOKENS, cell.seed)
        for step in range(steps):
            batch = [data[i] for i in next(batches)]
            n = sum(datum.n_answers for datum in batch)
            batch = [replace(datum, weights=datum.weights / n) for datum in batch]
            self.engine.forward_backward([Work(adapter, batch)])
            rate = LR * min((step + 1) / 5, 1.0 - 0.9 * step / steps)  # warm-up, then to a tenth
            self.engine.step(adapter, Adam(rate, beta2=0.99))
        return {
            **asdict(cell),
            "steps": steps,
            "n_parameters": adapter.n_parameters,
            "scores": {task: self._score(adapter, self.test[task]) for task in tasks},
        }

    def _score(self, adapter: LearningAdapter, data: list[Datum]) -> dict[str, float]:
        (outcome,) = self.engine.forward_backward([Work(adapter, data)], backward=False)
        n_tokens = sum(datum.n_answers for datum in data)
        return {"exact": sum(outcome.right) / len(data), "loss": outcome.loss / n_tokens}


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
