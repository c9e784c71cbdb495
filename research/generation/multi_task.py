"""Trains the shipped multi-task adapter on instruction tasks.

    python -m research.generation.multi_task tasks.jsonl.xz OUT --seconds 3600

A line of the file is a task: ``{"name", "source", "descriptions", "pairs"}``. A description is the
system turn. Either several pairs follow it, each in a chat of its own, or they are the turns of one
chat. All answers are learnt. Sources are drawn by the 0.6th power of their number of tasks, so that
a source of hundreds of tasks does not crowd out the others.
"""

import json
import lzma
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_generation.multi_task import MOST_TURNS
from loraplex_server.model.loading.pull import resolve_model
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.dtype import compute_dtype
from loraplex_training.engine.engine import TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.examples import Chat, Message, tokenise

_SHAPE = LoraShape(rank=16, alpha=32.0)
_POWER = 0.6  # of a source's number of tasks
_BATCH_TOKENS = 1200  # of a step, before common heads are shared
_MAX_LEN = 400  # tokens of a chat
_TURNS = 0.4  # share of the groups that are one chat of several turns
_MAX_PAIRS = MOST_TURNS  # of a group
_WARMUP = 40  # steps
_SAVE_EVERY_S = 300


class _Tasks(NamedTuple):
    by_source: list[list[dict[str, Any]]]
    weights: list[float]

    def draw(self, rng: random.Random) -> dict[str, Any]:
        (tasks,) = rng.choices(self.by_source, self.weights)
        return rng.choice(tasks)


def main(
    tasks: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    seconds: Annotated[float, typer.Option(help="Time of the training.", min=1)] = 3600,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 8e-4,
    start: Annotated[Path | None, typer.Option(help="Adapter to go on from.")] = None,
    base: Annotated[str | None, typer.Option(help="Default: the pulled base.")] = None,
    seed: int = 0,
) -> None:
    """Train for a time, with a rate that falls to nothing, and print the loss."""
    directory = resolve_model(base)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    dtype = compute_dtype(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    frozen = FrozenModel(model.config, ModelWeights(model), dtype=dtype, device="cpu")
    engine = TrainingEngine(frozen)
    adapter = engine.load_adapter(start) if start else engine.new_adapter(_SHAPE, seed)
    drawn, rng = _read(tasks), random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    began = saved = time.monotonic()
    loss, n_tokens = math.nan, 0
    while (share := (time.monotonic() - began) / seconds) < 1:
        works = _step(drawn, tokenizer, adapter, rng)
        outcomes = engine.forward_backward(works)
        rate = lr * min(1.0, (adapter.n_steps + 1) / _WARMUP) * max(0.02, 1 - share)
        engine.step(adapter, Adam(rate, beta2=0.99))
        n_tokens += sum(outcome.n_tokens for outcome in outcomes)
        now = sum(outcome.loss for outcome in outcomes)
        loss = now if math.isnan(loss) else 0.98 * loss + 0.02 * now
        if adapter.n_steps % 10 == 0:
            speed = n_tokens / (time.monotonic() - began)
            print(
                f"{adapter.n_steps} loss {loss:.3f}, {n_tokens} tokens, {speed:.0f}/s", flush=True
            )
        if time.monotonic() - saved > _SAVE_EVERY_S:
            adapter.save(out, directory.name, torch.bfloat16)
            saved = time.monotonic()
    adapter.save(out, directory.name, torch.bfloat16)
    print(f"{n_tokens} tokens in {adapter.n_steps} steps")


def _read(path: Path) -> _Tasks:
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            task = json.loads(line)
            by_source[task["source"].split("@")[0]].append(task)
    return _Tasks(list(by_source.values()), [len(each) ** _POWER for each in by_source.values()])


def _step(
    tasks: _Tasks, tokenizer: Any, adapter: LearningAdapter, rng: random.Random
) -> list[Work]:
    """Draw groups of about ``_BATCH_TOKENS`` tokens; the loss is the mean of their answers'."""
    groups: list[list[Datum]] = []
    n_tokens = n_answers = 0
    while n_tokens < _BATCH_TOKENS:
        group = _group(tasks.draw(rng), tokenizer, rng)
        groups.append(group)
        n_tokens += sum(map(len, group))
        n_answers += sum(datum.n_answers for datum in group)
    return [
        Work(adapter, [Datum(d.tokens, d.targets, d.weights / n_answers) for d in group])
        for group in groups
        if group
    ]


def _group(task: dict[str, Any], tokenizer: Any, rng: random.Random) -> list[Datum]:
    description = Message(role="system", content=rng.choice(task["descriptions"]))
    n_pairs = min(rng.randint(1, _MAX_PAIRS), len(task["pairs"]))
    turns = [
        [Message(role="user", content=prompt), Message(role="assistant", content=answer)]
        for prompt, answer in rng.sample(task["pairs"], n_pairs)
    ]
    chats = [[message for turn in turns for message in turn]] if rng.random() < _TURNS else turns
    data = []
    for messages in chats:
        chat = Chat([description, *messages])
        example = tokenise(chat, tokenizer, max_len=1 << 20, where=task["name"])
        datum = Datum.of_chat(example.tokens[:_MAX_LEN], example.learn[:_MAX_LEN])
        if datum.n_answers:
            data.append(datum)
    return data


if __name__ == "__main__":
    typer.run(main)
