"""The pages that say where things are name what is there, and leave nothing out."""

import importlib
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "architecture.md"
_FOLDERS = (
    "adapter_store",
    "deploy",
    "kernels",
    "loadtests",
    "router",
    "server",
    "tests",
    "training",
)
_PREFIXES = ("", "loraplex_server.", "loraplex_")  # of names in the table of owners


def _names(page: Path, pattern: str) -> set[str]:
    return set(re.findall(pattern, page.read_text(encoding="utf-8")))


def _section(title: str) -> str:
    text = _PAGE.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("folder", _FOLDERS)
def test_each_folder_has_a_readme_whose_files_exist(folder: str) -> None:
    readme = _ROOT / folder / "README.md"
    named = _names(readme, r"`([\w./]+\.(?:py|toml|yml|yaml|md))`")
    here = {path.relative_to(_ROOT).as_posix() for path in (_ROOT / folder).rglob("*.*")}
    missing = {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in here)}
    assert not missing
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 50


def test_the_readme_of_the_tests_names_every_folder() -> None:
    text = (_ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (_ROOT / "tests").glob("*/*.py")}
    assert folders
    assert {name for name in folders if f"`{name}/`" not in text} == set()


def test_every_room_of_the_server_is_on_the_page() -> None:
    text = _section("Packages")
    server = _ROOT / "server" / "loraplex_server"
    rooms = [p.name for p in server.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    hidden = {"__init__.py"}
    assert [name for name in rooms if name not in hidden and f"`{name}`" not in text] == []


def test_every_room_below_the_server_is_on_the_page() -> None:
    text = _section("Packages")
    for package in (
        "kernels/loraplex_kernels",
        "router/loraplex_router",
        "adapter_store/loraplex_adapter_store",
        "training/loraplex_training",
        "training/loraplex_generation",
    ):
        assert f"`{package}`" in text
        rooms = [p.parent.name for p in (_ROOT / package).glob("*/__init__.py")]
        assert [name for name in rooms if f"`{name}`" not in text] == [], package


def test_files_on_the_page_exist() -> None:
    named = _names(_PAGE, r"`([\w/]+\.py)`")
    assert len(named) > 10
    tree = [path.as_posix() for top in _FOLDERS for path in (_ROOT / top).rglob("*.py")]
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in tree)] == []


def test_owners_on_the_page_exist() -> None:
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+(?:\.[A-Z]\w+)?)`", _section("Who owns what"))
    assert len(named) > 20
    assert [name for name in named if not _resolves(name)] == []


def _resolves(name: str) -> bool:
    for prefix in _PREFIXES:
        module, _, attribute = f"{prefix}{name}".rpartition(".")
        try:
            if not attribute[0].isupper():
                importlib.import_module(f"{module}.{attribute}")
                return True
            return hasattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError:
            continue
    return False
