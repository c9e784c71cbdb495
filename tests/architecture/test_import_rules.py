"""The dependency direction of the packages, read from their sources."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = {
    "loraplex_server": _ROOT / "server",
    "loraplex_router": _ROOT / "router",
    "loraplex_adapter_store": _ROOT / "adapter_store",
    "loraplex_training": _ROOT / "training",
    "loraplex_generation": _ROOT / "training",
    "loraplex_kernels": _ROOT / "kernels",
}
_ALLOWED = {
    "loraplex_server": {
        "loraplex_router",
        "loraplex_adapter_store",
        "loraplex_training",
        "loraplex_generation",
        "loraplex_kernels",
    },
    "loraplex_router": {"loraplex_adapter_store", "loraplex_kernels"},
    "loraplex_generation": {"loraplex_adapter_store", "loraplex_training"},
    "loraplex_training": {"loraplex_adapter_store", "loraplex_kernels"},
    "loraplex_adapter_store": set[str](),
    "loraplex_kernels": set[str](),
}
# Rooms of the server from the bottom up; a room imports rooms below its own line only.
_FLOORS = (
    ("model",),
    ("engine", "text"),
    ("adapters",),
    ("metrics",),
    ("api",),
    ("cluster", "cli"),
)
_OUTSIDE = {"research", "tests", "loadtests"}  # what no package of the wheel imports
_BANNED_NAMES = {"utils", "helpers", "common", "manager", "base"}


def _files(package: str) -> Iterator[Path]:
    yield from sorted((_SOURCES[package] / package).rglob("*.py"))


@cache
def _imports(path: Path) -> frozenset[str]:
    """Return the absolute names of everything that a file imports."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    root = next(root for root in _SOURCES.values() if path.is_relative_to(root))
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*parent, *([node.module] if node.module else [])])


@pytest.mark.parametrize("package", _SOURCES)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    others = (set(_SOURCES) | _OUTSIDE) - {package} - _ALLOWED[package]
    wrong = [
        f"{path.relative_to(_ROOT)} imports {name}"
        for path in _files(package)
        for name in _imports(path)
        if name.partition(".")[0] in others
    ]
    assert not wrong


def test_of_the_store_the_router_knows_plans_alone() -> None:
    names = {name for path in _files("loraplex_router") for name in _imports(path)}
    of_store = {name for name in names if name.startswith("loraplex_adapter_store")}
    assert of_store <= {"loraplex_adapter_store.plan"}


@pytest.mark.parametrize("room", [room for floor in _FLOORS for room in floor])
def test_a_room_of_the_server_imports_only_lower_rooms(room: str) -> None:
    height = next(i for i, floor in enumerate(_FLOORS) if room in floor)
    others = {name for floor in _FLOORS[height:] for name in floor} - {room}
    forbidden = tuple(f"loraplex_server.{name}" for name in others)
    wrong = [
        f"{path.relative_to(_ROOT)} imports {name}"
        for path in sorted((_ROOT / "server" / "loraplex_server" / room).rglob("*.py"))
        for name in _imports(path)
        if name.startswith(tuple(f"{prefix}." for prefix in forbidden)) or name in forbidden
    ]
    # `loraplex cluster` starts a cluster.
    assert [line for line in wrong if "cli/cluster.py" not in line] == []


def test_no_file_is_named_after_nothing() -> None:
    wrong = [path for package in _SOURCES for path in _files(package) if path.stem in _BANNED_NAMES]
    assert not wrong


def test_nothing_opens_pickles() -> None:
    """torch.load and pickle stand in one file alone: the isolated converter."""
    wrong = []
    for package in _SOURCES:
        for path in _files(package):
            if path.stem == "unpickle_worker":
                continue
            text = path.read_text()
            if "torch.load" in text:
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                        wrong.append(f"{path.relative_to(_ROOT)}:{node.lineno}")
            if any(
                name.partition(".")[0] in {"pickle", "dill", "joblib"} for name in _imports(path)
            ):
                wrong.append(str(path.relative_to(_ROOT)))
    assert not wrong
