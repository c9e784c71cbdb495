"""The comparison of methods runs to its table, and its drawings and base can be learnt from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from research.few_shot.__main__ import METHODS


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
