"""A browser, and servers for it to look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server_process import ServerProcess, server_process

pytest.importorskip("playwright", reason="no playwright: the tests in a browser are skipped")
from playwright.sync_api import expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_PATIENCE_MS = 60_000
DEMOS = Path(__file__).parents[2] / "adapter_store" / "loraplex_adapter_store" / "demos"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is not None:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "page" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="no chromium: apt-get install chromium"))


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict[str, Any]:
    """Debian's browser; as root it has no sandbox."""
    return {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}


@pytest.fixture(scope="session")
def browser_context_args() -> dict[str, Any]:
    return {"viewport": {"width": 1100, "height": 800}, "permissions": ["clipboard-write"]}


@pytest.fixture(autouse=True)
def patient(request: pytest.FixtureRequest) -> None:
    """Other work may hold the machine."""
    if "page" in request.fixturenames:
        request.getfixturevalue("page").set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters of the default base."""
    folder = tmp_path_factory.mktemp("console") / "adapters"
    for name in ("pirate", "emoji"):
        shutil.copytree(DEMOS / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(
    pulled_base: Path, demos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    flags = ("--kv-memory", "256MiB", "--adapter-memory", "64MiB", "--adapters-dir", demos)
    with server_process(pulled_base, tmp_path_factory.mktemp("state"), *flags) as running:
        yield running
