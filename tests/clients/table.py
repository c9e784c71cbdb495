"""Renders the results of the clients as the table of docs/clients.md."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

_BEGINS = "<!-- `make clients` writes what follows -->"
_WORDS = {"passed": "works", "failed": "**fails**", "skipped": "skipped"}


def write_table(page: Path, results: Path, missing: Sequence[str]) -> None:
    """Replaces what follows the mark in ``page``.

    ``results``: JSON lines of conftest.py, of which the last counts for each test; ``missing``:
    the clients that have not ended.
    """
    tests = {}
    for line in results.read_text().splitlines():
        result = json.loads(line)
        tests[result["test"]] = result
    rows: dict[tuple[str, str], set[str]] = {}
    for result in tests.values():
        outcome = _WORDS.get(result["outcome"], result["outcome"])
        rows.setdefault((result["client"], result["tried"]), set()).add(outcome)
    table = [
        f"| {client} | {tried} | {', '.join(sorted(outcomes))} |"
        for (client, tried), outcomes in sorted(rows.items())
    ]
    head = page.read_text().partition(_BEGINS)[0] + _BEGINS
    ran = f"Run on {datetime.now(UTC):%Y-%m-%d}, {len(tests)} tests."
    if missing or any(result["outcome"] == "not run" for result in tests.values()):
        ran = f"**Partial**: {ran} Not ended: {', '.join(missing) or 'what says so'}."
    page.write_text(
        "\n".join([head, "", ran, "", "| client | tried | |", "| --- | --- | --- |", *table, ""])
    )
