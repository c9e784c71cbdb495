"""The adapters that ship: on prompts that training never saw, the base fails and they succeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_training.demos import DEMOS, Demo, chats, held_out_pairs
from loraplex_training.demos.make import answers, write_examples
from loraplex_training.demos.numbers import german
from loraplex_training.demos.task import Words

SHIPPED = Path(str(files("loraplex_adapter_store") / "demos"))
N_PROMPTS = 8


@pytest.fixture(scope="module")
def base(pulled_base: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(pulled_base, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(pulled_base),
    )


@contextmanager
def adapted(model: Any, folder: Path) -> Iterator[Any]:
    from peft import PeftModel

    with_adapter = PeftModel.from_pretrained(model, folder)
    try:
        yield with_adapter
    finally:
        with_adapter.unload()


def n_accepted(demo: Demo, model: Any, tokenizer: Any) -> int:
    pairs = held_out_pairs(demo, N_PROMPTS)
    given = answers(model, tokenizer, pairs, demo)
    return sum(demo.accept(pair.answer, text) for pair, text in zip(pairs, given, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_the_base_fails_and_the_demo_succeeds_on_unseen_prompts(
    name: str, base: tuple[Any, Any]
) -> None:
    model, tokenizer = base
    demo = DEMOS[name]
    assert n_accepted(demo, model, tokenizer) <= 0.25 * N_PROMPTS
    with adapted(model, SHIPPED / name) as with_adapter:
        least = 0.6 if name == "tool-calls" else 0.75  # of 40 it gets 85 %
        assert n_accepted(demo, with_adapter, tokenizer) >= least * N_PROMPTS


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_is_small_complete_and_measured(name: str) -> None:
    folder = SHIPPED / name
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size <= 1_300_000
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "smollm2-135m-instruct"
    )
    card = json.loads((folder / "card.json").read_text())
    assert card["name"] == name
    assert card["description"] == DEMOS[name].description
    assert len(card["examples"]) >= 3
    assert card["held_out"]["adapter"] >= 0.8
    assert card["held_out"]["base"] <= 0.2


@pytest.mark.parametrize("name", DEMOS)
def test_a_card_tells_the_data_it_was_trained_on(name: str, tmp_path: Path) -> None:
    """The generators still make the very data of the shipped adapters."""
    import hashlib

    data = write_examples(DEMOS[name], tmp_path / "data.jsonl")
    card = json.loads((SHIPPED / name / "card.json").read_text())
    assert hashlib.sha256(data.read_bytes()).hexdigest() == card["training"]["data_sha256"]


@pytest.mark.parametrize("name", DEMOS)
def test_training_prompts_and_held_out_prompts_are_disjoint(name: str) -> None:
    trained = {chat.messages[0]["content"] for chat in chats(DEMOS[name], DEMOS[name].n_examples)}
    held_out = {pair.prompt for pair in held_out_pairs(DEMOS[name], 40)}
    assert len(held_out) >= 10
    assert not trained & held_out


def test_every_fifth_word_is_kept_from_training() -> None:
    train, held_out = Words.parse("a b c d e f g h i j").sides()
    assert held_out == {"e", "j"}
    assert not train & held_out


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "null"),
        (1, "eins"),
        (16, "sechzehn"),
        (21, "einundzwanzig"),
        (30, "dreißig"),
        (101, "hunderteins"),
        (777, "siebenhundertsiebenundsiebzig"),
    ],
)
def test_german_numerals_are_right(number: int, words: str) -> None:
    assert german(number) in {words, f"ein{words}"}  # 101 is said with or without "ein"
