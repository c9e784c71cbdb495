"""The load tests know a server by its HTTP interface, not by its code.

Only `loadtests/parts` measures parts of the server, and imports them.
"""

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "loadtests"
ALLOWED = {"loraplex_server.model.loading.pull", "loraplex_server.model.errors"}  # to find the base


def imported(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.startswith("loraplex_")}


def test_nothing_of_the_packages_is_imported_but_the_way_to_a_base() -> None:
    files = [file for file in FOLDER.rglob("*.py") if FOLDER / "parts" not in file.parents]
    found = {name for file in files for name in imported(file)}
    assert found == ALLOWED
