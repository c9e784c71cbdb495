"""The console's page of a cluster: which engine holds which adapter, as /v1/cluster says."""

from collections.abc import Iterator

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

from tests.cluster.conftest import ADMIN
from tests.console.conftest import CHROMIUM
from tests.contract.conftest import ADMIN as ADMIN_KEY
from tests.support.servers.cluster_process import ClusterProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
_PATIENCE_MS = 60_000


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=_PATIENCE_MS)
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def test_the_page_says_who_holds_what(cluster: ClusterProcess, page: Page) -> None:
    names = ("a3", "a4", "a5")
    with httpx.Client(base_url=cluster.url, headers=ADMIN, timeout=120) as client:
        for name in names:
            body = {"prompt": "hi", "adapter": name, "max_tokens": 2}
            client.post("/v1/completions", json=body).raise_for_status()
        told = client.get("/v1/cluster").raise_for_status().json()["cluster"]
    page.goto(f"{cluster.url}/#/cluster")
    page.get_by_label("API key").fill(ADMIN_KEY)
    page.get_by_role("button", name="Enter").click()
    expect(page.get_by_role("link", name="cluster")).to_have_attribute("aria-current", "page")
    for engine in told["engines"]:
        region = page.get_by_role("region", name=f"Engine {engine['replica']}")
        expect(region).to_contain_text("alive")
        expect(region.get_by_role("meter")).to_have_count(4)
    table = page.get_by_role("region", name="Adapters by engine")
    for name in names:
        row = table.locator("tbody tr", has=page.get_by_text(name, exact=True))
        expect(row).to_contain_text("device")
    page.get_by_label("Search").fill(names[0])
    expect(table.locator("tbody tr")).to_have_count(1)
    expect(page.get_by_role("region", name="Front processes").locator("li")).to_have_count(
        len(told["fronts"])
    )
    assert Axe().run(page).violations_count == 0
