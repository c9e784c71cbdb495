"""The load tests know a server by its HTTP interface, not by its code."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "loadtests"
ALLOWED = {"loraplex_server.model.pull", "loraplex_server.model.errors"}  # to find the base


def imported(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.startswith("loraplex_")}


def test_nothing_of_the_packages_is_imported_but_the_way_to_a_base() -> None:
    found = {name for file in FOLDER.rglob("*.py") for name in imported(file)}
    assert found == ALLOWED
