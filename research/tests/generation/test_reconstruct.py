"""The measurement of reconstructions, on adapters that PEFT trained for a tiny base."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from research.generation.reconstruct import main
from tests.generation.test_store_methods import TASKS, TOKENIZER, Peft
from tests.support.bases.tiny_generation import tiny_qwen2_directory


@pytest.mark.usefixtures("pulled_encoder")
def test_known_adapters_come_back_in_a_fraction_of_their_bytes(tmp_path: Path) -> None:
    base = tiny_qwen2_directory(tmp_path / "base", spread=0.3)
    TOKENIZER.save_pretrained(base)
    adapters = tmp_path / "adapters"
    Peft(base).model.save_pretrained(adapters)
    for i, (description, answer) in enumerate(TASKS.items()):
        card = {"description": description, "examples": [f"question {n}" for n in range(8)]}
        (adapters / f"task{i}" / "card.json").write_text(json.dumps(card))
        rows = [{"prompt": f"question {n}", "answer": answer} for n in range(8, 18)]
        (adapters / f"task{i}" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    app = typer.Typer()
    app.command()(main)
    order = [
        str(adapters),
        "--base",
        str(base),
        "--rows",
        "8",
        "--max-tokens",
        "8",
        "--steps",
        "200",
    ]
    result = CliRunner().invoke(app, order)
    assert result.exit_code == 0, result.output
    mean = re.search(r"^mean .*$", result.output, re.M)
    assert mean is not None
    shares = dict(re.findall(r"(base|original|icm-lora|sg-lora) +(\d+)%", mean[0]))
    assert int(shares["base"]) < 20 < 80 < int(shares["original"])
    assert int(shares["icm-lora"]) >= int(shares["original"]) - 10
    assert "storage" in result.output
