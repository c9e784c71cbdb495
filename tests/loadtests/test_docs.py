"""The docs and the folder agree: no scenario without a line, no result that no page shows."""

import json
import re
from pathlib import Path

import pytest

from loadtests.scenario import scenario_files

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/load-testing.md").read_text()
RESULTS_PAGE = (ROOT / "docs/load-test-results.md").read_text()
OTHER_PAGES = ("docs/benchmarks.md", "docs/fairness.md")
PAGES = PAGE + RESULTS_PAGE + "".join((ROOT / page).read_text() for page in OTHER_PAGES)
RESULTS = sorted((ROOT / "loadtests/results").glob("*.json"))


@pytest.mark.parametrize("name", scenario_files())
def test_every_scenario_is_in_the_table_of_the_page(name: str) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_is_shown_by_a_page(path: Path) -> None:
    assert f"`{path.stem}" in PAGES or f"bench {path.stem}" in PAGES or path.name in PAGES


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_rates_of_a_result_are_those_of_the_page(path: Path) -> None:
    for rows in json.loads(path.read_text()).get("systems", {}).values():
        for row in rows:
            if "output_tok_s" in row:
                rate = int(row["output_tok_s"] + 0.5)
                assert re.search(rf"\b{rate}\b", PAGES), (row["label"], rate)
