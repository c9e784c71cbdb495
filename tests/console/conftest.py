"""A browser, and servers for it to look at."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.servers.server_process import ServerProcess, server_process

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's; as root it has no sandbox.

    Not pytest-playwright's: its event loop runs until the session's end, and asyncio's tests in the
    same process fail.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Yield a tab with long timeouts: other work may hold the machine."""
    expect.set_options(timeout=_PATIENCE_MS)
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(_PATIENCE_MS)
    yield context.new_page()
    context.close()


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
