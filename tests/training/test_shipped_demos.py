"""The adapters that ship: complete, described on the page, and better than the base."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from research.demos import DEMOS, held_out_pairs
from research.demos.make import answers

SHIPPED = Path(str(files("loraplex_adapter_store") / "demos"))
NAMES = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())
N_PROMPTS = 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["german-numbers", pytest.param("extract-email", marks=pytest.mark.nightly)]
)
def test_the_base_fails_and_the_demo_succeeds_on_unseen_prompts(
    name: str, pulled_base: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(pulled_base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(pulled_base)
    demo = DEMOS[name]
    pairs = held_out_pairs(demo, N_PROMPTS)

    def n_accepted(model: Any) -> int:
        replies = answers(model, tokenizer, pairs, demo)
        return sum(demo.accept(p.answer, text) for p, text in zip(pairs, replies, strict=True))

    assert n_accepted(model) <= 0.25 * N_PROMPTS
    assert n_accepted(PeftModel.from_pretrained(model, SHIPPED / name)) >= 0.75 * N_PROMPTS


@pytest.mark.parametrize("name", NAMES)
def test_a_demo_is_complete_and_measured(name: str) -> None:
    folder = SHIPPED / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m-instruct"
    assert (folder / "adapter_model.safetensors").is_file()
    card = json.loads((folder / "card.json").read_text())
    assert card["name"] == name
    assert len(card["examples"]) >= 3
    assert card["held_out"]["adapter"] >= 0.7
    assert card["held_out"]["base"] <= 0.2


def test_the_page_says_of_every_demo_what_its_card_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "demo-adapters.md").read_text()
    for name in NAMES:
        held = json.loads((SHIPPED / name / "card.json").read_text())["held_out"]
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | "))
        assert line.endswith(
            f"| {held['base']:.0%} | {held['adapter']:.1%} | {held['n_prompts']} |"
        )
