"""The table of docs/clients.md says what was tried, and what was not."""

import json
import subprocess
import tomllib
from pathlib import Path

from tests.clients.__main__ import CLIENTS
from tests.clients.table import write_table

_HEAD = "# Clients\n\n<!-- `make clients` writes what follows -->"


def _write(folder: Path, outcomes: list[tuple[str, str]], missing: list[str]) -> str:
    page, results = folder / "page.md", folder / "results.jsonl"
    page.write_text(f"{_HEAD}\nold rows\n")
    lines = [
        {"test": test, "client": "llm 1.0", "tried": test[:1], "outcome": outcome}
        for test, outcome in outcomes
    ]
    results.write_text("\n".join(map(json.dumps, lines)))
    write_table(page, results, missing)
    text = page.read_text()
    assert text.startswith(_HEAD)
    assert "old rows" not in text
    return text


def test_the_last_outcome_of_a_test_counts(tmp_path: Path) -> None:
    outcomes = [("a", "not run"), ("b1", "not run"), ("b2", "not run")]
    outcomes += [("a", "passed"), ("b1", "passed"), ("b2", "failed")]
    text = _write(tmp_path, outcomes, [])
    assert "Partial" not in text
    assert "| llm 1.0 | a | works |" in text
    assert "| llm 1.0 | b | **fails**, works |" in text


def test_a_run_that_did_not_end_is_partial(tmp_path: Path) -> None:
    text = _write(tmp_path, [("a", "passed")], ["openai (2)"])
    assert "**Partial**" in text
    assert "openai (2)" in text


def test_a_test_that_did_not_end_is_seen(tmp_path: Path) -> None:
    text = _write(tmp_path, [("a", "passed"), ("b", "not run")], [])
    assert "**Partial**" in text
    assert "| llm 1.0 | b | not run |" in text


def test_every_client_is_installed_and_run() -> None:
    groups = tomllib.loads(Path("pyproject.toml").read_text())["dependency-groups"]
    assert list(groups) == list(CLIENTS)
    files = {f"test_{client}.py" for clients in CLIENTS.values() for client in clients}
    there = {file.name for file in Path(__file__).parent.glob("test_*.py")}
    assert files == there - {Path(__file__).name}


def test_make_installs_the_groups_of_pyproject() -> None:
    command = ["make", "--dry-run", "--always-make", "clients"]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"for group in {' '.join(CLIENTS)}; do" in steps
