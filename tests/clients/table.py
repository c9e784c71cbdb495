"""What worked, as the table of docs/clients.md."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["write_table"]

_BEGINS = "<!-- `make clients` writes what follows -->"
_WORDS = {"passed": "works", "failed": "**fails**", "skipped": "skipped"}


def write_table(page: Path, results: Path) -> None:
    """Replaces what follows the mark in ``page``. ``results``: JSON lines of conftest.py."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in results.read_text().splitlines():
        result = json.loads(line)
        rows.setdefault((result["client"], result["tried"]), []).append(result["outcome"])
    table = [
        f"| {client} | {tried} | {', '.join(sorted({_WORDS[o] for o in outcomes}))} |"
        for (client, tried), outcomes in sorted(rows.items())
    ]
    head = page.read_text().partition(_BEGINS)[0] + _BEGINS
    ran = f"Run on {datetime.now(UTC):%Y-%m-%d}."
    page.write_text(
        "\n".join([head, "", ran, "", "| client | tried | |", "| --- | --- | --- |", *table, ""])
    )
