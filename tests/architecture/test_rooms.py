"""Rooms stay small, and a constructor takes few things."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_TOPS = (
    "server",
    "kernels",
    "adapter_store",
    "training",
    "router",
    "loadtests",
    "research",
    "tests",
)
_SOURCES = {".py", ".cpp", ".h", ".inc"}
_MAX_FILES = 22  # "about twenty"
_MAX_PARAMETERS = 10


def _sources() -> Iterator[Path]:
    for top in _TOPS:
        for path in (_ROOT / top).rglob("*"):
            if path.suffix in _SOURCES and not {"node_modules", "build"} & set(path.parts):
                yield path


def test_no_folder_holds_more_than_about_twenty_files() -> None:
    sizes = Counter(path.parent.relative_to(_ROOT).as_posix() for path in _sources())
    assert {folder: n for folder, n in sizes.items() if n > _MAX_FILES} == {}


def test_no_constructor_takes_more_than_ten_parameters() -> None:
    wrong = []
    for path in _sources():
        if path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        if "def __init__" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                n_parameters = len(node.args.args) + len(node.args.kwonlyargs) - 1  # less self
                if n_parameters > _MAX_PARAMETERS:
                    wrong.append(f"{path.relative_to(_ROOT)}:{node.lineno}: {n_parameters}")
    assert wrong == []
