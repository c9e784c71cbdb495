"""The imports between the files of a package, read from its sources. Lazy imports count."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, frozenset[str]]


def import_graph(root: Path, package: str) -> Graph:
    """Module name → the modules of the same package that its file imports, at any depth of code.

    ``root`` is the folder that holds the folder ``package``. ``from x import y`` names the module
    ``x.y`` if there is one, else ``x``. Imports for type checking count; the packages that Python
    imports on the way to a module do not.
    """
    files = {_name(root, path): path for path in sorted((root / package).rglob("*.py"))}
    return {name: frozenset(_targets(name, path, files) - {name}) for name, path in files.items()}


def room_graph(graph: Graph) -> Graph:
    """Room → the rooms that it imports. A room is a folder or a file right below the package.

    The package's own file is left out, since it names what is public.
    """

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    rooms: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if "." in name:
            others = {room(other) for other in imported if "." in other}
            rooms.setdefault(room(name), set()).update(others - {room(name)})
    return {name: frozenset(others) for name, others in rooms.items()}


def cycles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other, each sorted. Empty if there is no cycle."""
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted({name, *(other for other in reach[name] if name in reach.get(other, ()))}))
        for name in graph
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reachable(graph: Graph, start: str) -> set[str]:
    found, todo = set[str](), [start]
    while todo:
        new = graph.get(todo.pop(), frozenset()) - found
        found |= new
        todo += new
    return found


def _name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _targets(name: str, path: Path, files: Mapping[str, Path]) -> set[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    targets = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for target in _imported(node, package, files):
            if target in files:
                targets.add(target)
    return targets


def _imported(node: ast.AST, package: list[str], files: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parent = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*parent, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            yield inner if inner in files else source
