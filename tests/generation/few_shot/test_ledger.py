"""The rule: chosen on validation alone, tested once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from adapter_store.benchmarks.few_shot.cells import Cell, CellFile, Measured
from adapter_store.benchmarks.few_shot.ledger import Choice, LedgerRefused, TestLedger, choose

CHOICE = Choice({"lr": 6e-3}, "0" * 64, 12, "2026-01-01")


class Repository:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "test.jsonl"
        self.git("init", "-q")
        self.commit("first")
        self.ledger = TestLedger(folder / "test_runs.jsonl", folder, deciding=["code.py"])

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=n@example.com"]
        command = ["git", "-C", str(self.folder), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def commit(self, text: str, file: str = "code.py") -> None:
        (self.folder / file).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-qm", text)

    def begin(self, choice: Choice = CHOICE, *, again: bool = False, rows: int = 100) -> None:
        self.ledger.begin(choice, out=self.out, rows=rows, budget_s=30.0, again=again)

    @property
    def runs(self) -> list[dict[str, object]]:
        lines = (self.folder / "test_runs.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_a_run_is_noted_with_its_commit_date_and_choice(repository: Repository) -> None:
    repository.begin()
    run = repository.runs[0]
    assert run["commit"] == repository.git("rev-parse", "HEAD").strip()
    assert str(run["date"])[:2] == "20"
    assert run["choice"] == {
        "recipe": {"lr": 6e-3},
        "validation_cells": "0" * 64,
        "n_cells": 12,
        "date": "2026-01-01",
    }


def test_a_stopped_run_goes_on_with_the_files_that_it_wrote(repository: Repository) -> None:
    repository.begin()
    repository.out.write_text("{}\n")
    repository.begin()
    assert len(repository.runs) == 1


def test_a_second_run_is_refused_and_noted_if_asked_for(repository: Repository) -> None:
    repository.begin()
    repository.commit("better, having seen the test")
    with pytest.raises(LedgerRefused, match="the test was run on"):
        repository.begin()
    repository.begin(again=True)
    first, second = repository.runs
    assert first["commit"] != second["commit"]


def test_a_run_goes_on_after_commits_that_decide_no_result(repository: Repository) -> None:
    repository.begin()
    repository.out.write_text("{}\n")
    repository.commit("what was measured so far", "report.md")
    repository.begin()
    assert len(repository.runs) == 1
    assert repository.runs[0]["commit"] == repository.git("rev-parse", "HEAD~1").strip()


def test_other_rows_are_a_second_look(repository: Repository) -> None:
    repository.begin()
    with pytest.raises(LedgerRefused, match="second look"):
        repository.begin(rows=50)


def test_another_choice_at_the_same_commit_is_a_second_run(repository: Repository) -> None:
    repository.begin()
    with pytest.raises(LedgerRefused, match="--again"):
        repository.begin(Choice({}, "0" * 64, 12, "2026-01-01"))


def test_code_that_no_commit_names_is_not_tested(repository: Repository) -> None:
    (repository.folder / "code.py").write_text("changed")
    with pytest.raises(LedgerRefused, match=r"commit first.*code\.py"):
        repository.begin()


def test_without_a_choice_there_is_no_test(tmp_path: Path) -> None:
    with pytest.raises(LedgerRefused, match="choose on validation first"):
        Choice.load(tmp_path / "choice.json")


def _swept(path: Path, nll: dict[tuple[tuple[str, float], ...], list[float]]) -> CellFile:
    kept = CellFile(path)
    for recipe, values in nll.items():
        for draw, value in enumerate(values):
            cell = Cell("vowels/plain", "ours", 8, draw, rows=10, recipe=recipe)
            kept.add(Measured(cell, 0.5, value, 1.0, 1.0, 1.0))
    return kept


def test_the_lowest_nll_where_all_recipes_were_run_is_chosen_and_kept(tmp_path: Path) -> None:
    faster = (("lr", 6e-3),)
    kept = _swept(tmp_path / "sweep.jsonl", {(): [1.0, 1.0, 0.0], faster: [0.5, 0.7]})
    made = choose(kept)  # the third draw has no partner
    assert made.recipe == {"lr": 6e-3}
    made.save(tmp_path / "choice.json")
    assert Choice.load(tmp_path / "choice.json") == made


def test_nothing_is_chosen_by_cells_that_compare_nothing(tmp_path: Path) -> None:
    with pytest.raises(LedgerRefused, match="no cells"):
        choose(CellFile(tmp_path / "none.jsonl"))
