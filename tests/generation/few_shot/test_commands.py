"""What the commands say before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapter_store.benchmarks.few_shot import __main__ as commands
from adapter_store.benchmarks.few_shot.cells import Cell, CellFile, Measured
from adapter_store.benchmarks.few_shot.planning import GRID

RUNNER = CliRunner()


def test_a_plan_says_how_long_and_fits_into_minutes(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "none.jsonl"), "--k", "8", "--draws", "1"]
    whole = RUNNER.invoke(commands.app, ["plan", *out])
    part = RUNNER.invoke(commands.app, ["plan", *out, "--minutes", "60"])
    assert whole.exit_code == part.exit_code == 0, whole.output
    assert "lorahub" in whole.output
    assert "multi-task" not in whole.output  # without its adapter

    def hours(output: str) -> float:
        return float(output.splitlines()[-1].split(": ")[1].split()[0])

    assert 0 < hours(part.output) <= 1.0 < hours(whole.output)


def test_an_arm_that_does_not_exist_is_named_with_the_known_ones() -> None:
    result = RUNNER.invoke(commands.app, ["plan", "--arm", "magic"])
    assert result.exit_code == 2
    assert "text-to-lora" in result.output


def test_a_plan_can_be_of_what_is_new_about_a_task(tmp_path: Path) -> None:
    words = ["plan", "--out", str(tmp_path / "none.jsonl"), "--k", "8", "--draws", "1"]
    of_a_kind = RUNNER.invoke(commands.app, [*words, "--new", "family", "--arm", "ours"])
    assert of_a_kind.exit_code == 0, of_a_kind.output
    assert "8 of      8 cells" in of_a_kind.output  # of 51 validation tasks
    unknown = RUNNER.invoke(commands.app, [*words, "--new", "magic"])
    assert unknown.exit_code == 2
    assert "interpolation" in unknown.output


def test_the_librarys_tests_can_be_run_and_the_test_set_cannot(tmp_path: Path) -> None:
    words = ["plan", "--out", str(tmp_path / "none.jsonl"), "--arm", "ours", "--k", "4"]
    h1 = RUNNER.invoke(commands.app, [*words, "--draws", "1", "--split", "shipped", "--set", "h1"])
    assert h1.exit_code == 0, h1.output
    assert "10 of     10 cells" in h1.output
    test = RUNNER.invoke(commands.app, [*words, "--set", "test"])
    assert test.exit_code == 2
    assert "validation" in test.output


def test_the_test_does_not_run_without_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "CHOICE", tmp_path / "choice.json")
    monkeypatch.setattr(commands, "LEDGER", tmp_path / "test_runs.jsonl")
    result = RUNNER.invoke(commands.app, ["test", "--out", str(tmp_path / "test.jsonl")])
    assert result.exit_code == 1
    assert "choose on validation first" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_choice_is_written_from_a_sweep_and_a_report_from_cells(tmp_path: Path) -> None:
    kept = CellFile(tmp_path / "sweep.jsonl")
    for recipe, nll in zip(GRID[:2], (1.0, 0.4), strict=True):
        told = tuple(sorted(recipe.items()))
        cell = Cell("vowels/plain", "ours", 8, 0, rows=10, recipe=told)
        kept.add(Measured(cell, 0.5, nll, 1.0, 1.0, 1.0))
    choice, sweep = tmp_path / "choice.json", str(kept.path)
    made = RUNNER.invoke(commands.app, ["choose", "--sweep-file", sweep, "--choice", str(choice)])
    assert made.exit_code == 0, made.output
    assert json.loads(choice.read_text())["recipe"] == GRID[1]
    report = tmp_path / "report.md"
    assert RUNNER.invoke(commands.app, ["report", sweep, "--out", str(report)]).exit_code == 2
    one = CellFile(tmp_path / "one.jsonl")
    one.add(next(iter(kept)))
    found = RUNNER.invoke(commands.app, ["report", str(one.path), "--out", str(report)])
    assert found.exit_code == 0, found.output
    assert "| ours | 8 |" in report.read_text()
    assert report.with_suffix(".svg").is_file()
