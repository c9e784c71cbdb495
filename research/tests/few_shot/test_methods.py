"""The comparison of methods runs to its table, and its drawings and base can be learnt from."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from research.few_shot.__main__ import METHODS
from research.few_shot.described import ARMS
from research.few_shot.drawings import COLOURS


@pytest.mark.timeout(900)
def test_each_method_has_a_row(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    few = ("--pretraining", "100", "--steps", "40", "--seeds", "1", "--shots", "2")
    command = [sys.executable, "-m", "research.few_shot", "--out", str(out), *few]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(out.read_text())["rows"]
    assert [(row["shots"], row["method"]) for row in rows] == [(2, method) for method in METHODS]
    assert rows[0]["base_known"] > 5 / 41  # a guess would be 1 of 41
    assert all(f"| {method} |" in table for method in (*METHODS, "zero-shot"))


@pytest.mark.timeout(900)
def test_a_colour_is_described_alone(tmp_path: Path) -> None:
    out = tmp_path / "described.json"
    few = ("--pretraining", "100", "--steps", "5", "--shots", "2")
    command = [sys.executable, "-m", "research.few_shot.described", "--out", str(out), *few]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    scores = json.loads(out.read_text())["scores"]
    assert list(scores) == list(COLOURS)
    assert all(set(of_colour) == {*ARMS} for of_colour in scores.values())
    assert mean(of_colour["base"] for of_colour in scores.values()) > 1 / 6  # a guess
    assert all(f"{arm} " in printed for arm in ARMS)
