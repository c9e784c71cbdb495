"""The menu of a key has what the key may do, and a page that it may not see says why."""

import hashlib
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
KEYS = {
    "operator": 'scope = "admin"\noperator = true',
    "acme": 'scope = "admin"\ntenant = "acme"',
    "acme-app": 'scope = "infer"\ntenant = "acme"',
    "prometheus": 'scope = "metrics"',
}
MENUS = {
    "operator": ["playground", "adapters", "create", "live", "requests"],
    "acme": ["playground", "adapters", "create", "requests"],
    "acme-app": ["playground", "adapters", "requests"],
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the keys of an operator and a tenant, and an adapter that they share."""
    folder = tmp_path_factory.mktemp("house")
    write_lora(folder / "adapters" / "shared", BaseSpec.of(tiny_model(), "tiny"))
    keys = folder / "keys.toml"
    keys.write_text(
        "\n".join(
            f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            f"{table}\n"
            for name, table in KEYS.items()
        )
    )
    flags = ("--adapters-dir", folder / "adapters", "--keys", keys)
    with server_process(save_tiny_model(folder / "tiny"), folder / "state", *flags) as server:
        yield server


def enter(page: Page, server: ServerProcess, route: str, key: str) -> None:
    page.goto(f"{server.url}/{route}")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Enter").click()


@pytest.mark.parametrize("key", MENUS)
def test_the_menu_has_the_pages_that_the_key_may_use(
    page: Page, house: ServerProcess, key: str
) -> None:
    enter(page, house, "#/requests", key)
    expect(page.get_by_role("heading", name="Requests")).to_be_visible()
    entries = page.get_by_role("navigation", name="Pages").get_by_role("link")
    expect(entries).to_have_count(len(MENUS[key]))
    assert entries.all_inner_texts() == [name.capitalize() for name in MENUS[key]]
    for name in MENUS[key]:
        entries.and_(page.get_by_text(name, exact=True)).click()
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(
    ("key", "route", "told"),
    [
        ("acme", "live", "This key may not see all"),
        ("acme", "cluster", "This server is one process"),
        ("acme-app", "create", "This key may only ask"),
    ],
)
def test_a_page_that_is_not_for_the_key_says_why(
    page: Page, house: ServerProcess, key: str, route: str, told: str
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    enter(page, house, f"#/{route}", key)
    expect(page.get_by_text(told)).to_be_visible()
    assert not [url for url in asked if "/v1/live" in url or "/v1/cluster" in url]
    assert Axe().run(page).violations_count == 0


def test_a_tenant_reads_the_card_of_what_the_operator_shares(
    page: Page, house: ServerProcess
) -> None:
    enter(page, house, "#/adapters?name=shared", "acme")
    expect(page.get_by_role("img", name="How much each layer is changed")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("button", name="Delete …")).to_have_count(0)


def test_a_key_for_metrics_alone_is_told_so_and_another_can_be_entered(
    page: Page, house: ServerProcess
) -> None:
    enter(page, house, "#/adapters", "prometheus")
    expect(page.get_by_role("alert")).to_contain_text("lacks the scope 'infer'")
    page.get_by_label("API key").fill("acme")
    page.get_by_role("button", name="Enter").click()
    expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
