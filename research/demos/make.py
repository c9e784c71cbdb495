"""Train a demo from its generator, and measure what it learnt on prompts it never saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraplex_training.config import TrainingConfig
from loraplex_training.examples import Chat
from loraplex_training.run import OnStep
from loraplex_training.trainer import train

from .task import Course, Demo, Pair, chats, held_out_pairs, later_chats, shown_prompts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_N_VALIDATION = 24
_N_SHOWN = 16  # example prompts of the card


class Measured(NamedTuple):
    """Shares of held-out prompts whose answer is accepted."""

    base: float
    adapter: float
    n_prompts: int


def make_demo(
    demo: Demo,
    folder: Path,
    *,
    base: Path,
    base_name: str,
    work: Path,
    on_step: OnStep = lambda report: None,
) -> Measured:
    """Generate, train (resuming what was begun), measure; ``folder`` is then a whole adapter.

    Scratch data live below ``work``. The measurement is added to the card.
    """
    course = TrainingConfig(
        data=write_examples(demo, work / f"{demo.name}.jsonl"),
        out=work / f"{demo.name}-first",
        base=base,
        base_name=base_name,
        shape=demo.shape,
        schedule=demo.schedule,
        name=demo.name,
        description=demo.description,
        prompts=shown_prompts(demo, _N_SHOWN),
        chat_template=demo.chat_template,
    )
    for later in demo.later:
        if not _was_trained(course):
            _train(course, on_step, again=True)
        course = replace(
            course,
            data=write_later_examples(demo, later, work / f"{demo.name}-{later.name}.jsonl"),
            out=work / f"{demo.name}-{later.name}",
            schedule=later.schedule,
            start=course.out,
        )
    course = replace(course, out=folder)
    is_trained = (folder / "adapter_config.json").exists() and not (folder / ".training").exists()
    if not is_trained:  # otherwise only the measurement was interrupted
        _train(course, on_step, again=False)
    measured = measure(demo, folder, base=base, n_prompts=40)
    card_path = folder / "card.json"
    card = json.loads(card_path.read_text())
    if demo.defaults:
        card["defaults"] = dict(demo.defaults)
    card["held_out"] = measured._asdict()
    card_path.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    return measured


def is_made(folder: Path) -> bool:
    """Whether ``folder`` holds a demo that was trained to the end and measured."""
    try:
        return "held_out" in json.loads((folder / "card.json").read_text())
    except (OSError, ValueError):
        return False


def write_examples(demo: Demo, path: Path) -> Path:
    """The training data of ``demo`` as JSONL; the same bytes every time."""
    return _write(chats(demo, demo.n_examples), path)


def write_later_examples(demo: Demo, course: Course, path: Path) -> Path:
    """The data of one of its later courses, likewise."""
    return _write(later_chats(demo, course), path)


def measure(demo: Demo, folder: Path, *, base: Path, n_prompts: int) -> Measured:
    """Greedy answers of the base alone and with the adapter in ``folder``, through PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    pairs = held_out_pairs(demo, n_prompts)
    without = _share(demo, pairs, answers(model, tokenizer, pairs, demo))
    adapted = PeftModel.from_pretrained(model, folder)
    with_it = _share(demo, pairs, answers(adapted, tokenizer, pairs, demo))
    return Measured(base=without, adapter=with_it, n_prompts=len(pairs))


def answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], demo: Demo
) -> list[str]:
    """Greedy answers, in one left-padded batch."""
    import torch

    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            pair.chat(),
            tools=list(pair.tools) or None,
            chat_template=demo.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        for pair in pairs
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    with torch.inference_mode():
        output = generate(**batch, max_new_tokens=demo.max_new_tokens, do_sample=False)
    new = output[:, batch["input_ids"].shape[1] :]
    given: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return given


def _share(demo: Demo, pairs: Sequence[Pair], given: Sequence[str]) -> float:
    good = [demo.accept(pair.answer, text) for pair, text in zip(pairs, given, strict=True)]
    return sum(good) / len(good)


def _write(lines: Sequence[Chat], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(chat.to_json(), ensure_ascii=False) + "\n" for chat in lines)
    path.write_text(text, encoding="utf-8")
    return path


def _train(config: TrainingConfig, on_step: OnStep, *, again: bool) -> None:
    n_lines = len(config.data.read_text(encoding="utf-8").splitlines())
    config = replace(config, validation=_N_VALIDATION / n_lines)
    train(config, on_step=on_step, overwrite=again)


def _was_trained(config: TrainingConfig) -> bool:
    """Whether ``config.out`` is what ``config`` makes."""
    try:
        done = json.loads((config.out / "card.json").read_text())["training"]
    except (OSError, ValueError, KeyError):
        return False
    digest = hashlib.sha256(config.data.read_bytes()).hexdigest()
    same_schedule = json.dumps(done["schedule"]) == json.dumps(asdict(config.schedule))
    return bool(done["data_sha256"] == digest and same_schedule)
