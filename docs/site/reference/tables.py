"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["cell", "table"]


def cell(text: str) -> str:
    """Return the text on one line, escaped for a table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines and an empty one; nothing if there are no rows. Cells are Markdown already."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return []
    return [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *lines, ""]
