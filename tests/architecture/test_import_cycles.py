"""Files and folders of a package do not import each other in circles, not even inside functions."""

from pathlib import Path

import pytest

from tests.architecture.import_graph import cycles, import_graph, room_graph

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = {  # by the folder that holds them
    "loraplex_kernels": "kernels",
    "loraplex_adapter_store": "adapter_store",
    "loraplex_training": "training",
    "loraplex_generation": "training",
    "loraplex_router": "router",
    "loraplex_server": "server",
}


@pytest.mark.parametrize("package", _PACKAGES)
def test_no_files_import_each_other(package: str) -> None:
    assert cycles(import_graph(_ROOT / _PACKAGES[package], package)) == []


@pytest.mark.parametrize("package", _PACKAGES)
def test_no_rooms_import_each_other(package: str) -> None:
    graph = import_graph(_ROOT / _PACKAGES[package], package)
    assert cycles(room_graph(graph)) == []


def test_a_lazy_import_closes_a_cycle(tmp_path: Path) -> None:
    package = tmp_path / "p"
    (package / "low").mkdir(parents=True)
    (package / "__init__.py").write_text("from .a import x\n")
    (package / "a.py").write_text("from .low import b\nx = 1\n")
    (package / "low" / "__init__.py").write_text("")
    (package / "low" / "b.py").write_text("def f():\n    from p.low.c import y\n")
    (package / "low" / "c.py").write_text("y = 1\n")
    graph = import_graph(tmp_path, "p")
    assert graph["p.a"] == {"p.low.b"}
    assert cycles(graph) == cycles(room_graph(graph)) == []
    (package / "low" / "c.py").write_text("def g():\n    import p.a\n")
    graph = import_graph(tmp_path, "p")
    assert cycles(graph) == [["p.a", "p.low.b", "p.low.c"]]
    assert cycles(room_graph(graph)) == [["p.a", "p.low"]]
