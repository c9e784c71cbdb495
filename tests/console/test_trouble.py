"""The console under trouble: keys, broken streams, restarts, many adapters."""

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
KEY = "the-key-of-this-test"
ASKING_KEY = "one-that-may-only-ask"
N_MANY = 500
PAGES = ("playground", "adapters", "create", "live", "requests")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def many(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of a tiny model with 500 adapters, behind a key."""
    folder = tmp_path_factory.mktemp("many")
    spec = BaseSpec.of(tiny_model(), "tiny")
    for seed in range(N_MANY):
        write_lora(folder / "adapters" / f"task-{seed:03}", spec, seed=seed)
    flags = ("--adapters-dir", folder / "adapters", "--api-key", KEY)
    flags = (*flags, "--infer-api-key", ASKING_KEY)
    with server_process(tiny, folder / "state", *flags) as server:
        yield server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def enter(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Enter").click()


def test_a_wrong_key_is_told_and_the_right_one_is_kept_for_the_tab(
    page: Page, many: ServerProcess
) -> None:
    page.goto(f"{many.url}/#/adapters")
    enter(page, "wrong")
    expect(page.get_by_role("alert")).to_contain_text("no valid API key")
    enter(page, KEY)
    expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()


def test_a_key_that_may_only_ask_is_shown_nothing_that_changes_adapters(
    page: Page, many: ServerProcess
) -> None:
    page.goto(f"{many.url}/#/adapters?name=task-000")
    for key, shown in ((ASKING_KEY, 0), (KEY, 1)):
        enter(page, key)
        row = page.locator("tr", has=page.get_by_role("button", name="task-000", exact=True))
        row.get_by_role("button", name="Actions for task-000").click()
        expect(row.get_by_role("link", name="Try in the playground")).to_be_visible()
        expect(page.get_by_role("img", name="How much each layer is changed")).to_be_visible()
        expect(page.get_by_role("form", name="Add an adapter")).to_have_count(shown)
        for name in ("Pin", "Warm"):
            expect(row.get_by_role("button", name=name)).to_have_count(shown)
        expect(page.get_by_role("button", name="Delete …")).to_have_count(shown)
        expect(page.get_by_role("link", name="create")).to_have_count(shown)
        page.get_by_role("button", name="Forget the key").click()
        page.goto(f"{many.url}/#/adapters?name=task-000")


def test_500_adapters_are_searched_and_shown_in_parts(page: Page, many: ServerProcess) -> None:
    page.goto(f"{many.url}/#/adapters")
    enter(page, KEY)
    rows = page.get_by_role("region", name="Adapters").locator("tbody tr")
    expect(page.get_by_test_id("count")).to_have_text(f"{N_MANY} of {N_MANY}")
    expect(rows).to_have_count(100)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(200)
    page.get_by_label("Search").fill("task-49")
    expect(rows).to_have_count(10)


def test_a_stream_that_breaks_and_a_server_that_comes_back(
    page: Page, tiny: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    flags = ("--port", port)  # the later flag counts
    with server_process(tiny, tmp_path, *flags) as server:
        page.goto(f"{server.url}/#/playground")
        page.get_by_label("Prompt", exact=True).fill("hi")
        page.get_by_text("Settings", exact=True).click()
        page.get_by_label("Max tokens").fill("4000")
        page.get_by_role("button", name="Ask all").click()
        expect(page.locator(".answer").first).not_to_contain_text("Nothing asked yet.")
        expect(page.locator(".answer").first).to_have_text(re.compile(r"[\s\S]{20}"))
        server.signal(signal.SIGKILL)
        expect(page.get_by_role("alert")).to_contain_text("broke off")
    page.evaluate("location.hash = '#/live'")
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    with server_process(tiny, tmp_path, *flags):
        expect(page.get_by_text("Nothing runs.")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_accessible(page: Page, many: ServerProcess, name: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{many.url}/#/{name}")
    enter(page, KEY)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    if name == "live":
        expect(page.get_by_text("Nothing runs.")).to_be_visible()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_needs_no_sideways_scrolling(page: Page, many: ServerProcess, name: str) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    page.goto(f"{many.url}/#/{name}")
    enter(page, KEY)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    if name == "adapters":
        expect(page.get_by_role("region", name="Adapters").locator("tbody tr")).to_have_count(100)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 375


def test_the_keyboard_alone_asks_all(page: Page, many: ServerProcess) -> None:
    page.goto(f"{many.url}/#/playground")
    page.keyboard.press("Tab")
    enter(page, KEY)
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("hi")
    page.keyboard.press("Tab")  # the settings
    page.keyboard.press("Tab")  # the button
    page.keyboard.press("Enter")
    expect(page.locator("section[aria-label^=Answer] > p.muted").first).to_contain_text("tokens")


def test_one_process_has_no_page_of_a_cluster(page: Page, many: ServerProcess) -> None:
    page.goto(f"{many.url}/#/adapters")
    enter(page, KEY)
    expect(page.get_by_role("link", name="requests")).to_be_visible()
    expect(page.get_by_role("link", name="cluster")).to_have_count(0)


def test_without_a_console_there_is_no_page(tiny: Path, tmp_path: Path) -> None:
    with server_process(tiny, tmp_path, "--no-console") as server:
        for path in ("/", "/console/console.js"):
            assert httpx.get(server.url + path).status_code == 404
        assert httpx.get(server.url + "/health").status_code == 200
