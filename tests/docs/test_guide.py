"""The documentation is built without warnings, asks nothing of other hosts, and is served."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from loraplex_server.api.static_pages import GUIDE
from tests.console.conftest import CHROMIUM
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def built() -> Path:
    """Build the site as `make docs` does."""
    command = [sys.executable, "-m", "docs.site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return GUIDE


@pytest.fixture(scope="module")
def server(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    tiny = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    key = ("--api-key", "sk-guide")  # the guide needs none
    with server_process(tiny, tmp_path_factory.mktemp("state"), *key) as running:
        yield running


def _pages(built: Path) -> list[Path]:
    pages = sorted(built.rglob("*.html"))
    assert len(pages) > 60
    return pages


def test_no_page_needs_more_than_its_policy_allows(built: Path) -> None:
    for page in _pages(built):
        tags = _Tags()
        tags.feed(page.read_text(encoding="utf-8"))
        for tag, attributes in tags.found:
            assert tag != "style", page
            assert not [name for name in attributes if name == "style" or name.startswith("on")]
            if tag == "script" and "src" not in attributes:
                assert attributes.get("type") == "application/json", page
            loads = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
            assert loads is None or not re.match(r"(\w+:)?//", loads), (page, loads)


def test_every_link_within_the_guide_leads_somewhere(built: Path) -> None:
    """MkDocs checks links of Markdown; this also sees those of templates and of HTML in pages."""
    ids: dict[Path, set[str | None]] = {}
    links: list[tuple[Path, str]] = []
    for page in _pages(built):
        tags = _Tags()
        tags.feed(page.read_text(encoding="utf-8"))
        ids[page] = {attributes.get("id") for _, attributes in tags.found}
        links += [
            (page, link)
            for tag, attributes in tags.found
            if (link := attributes.get("href") or attributes.get("src"))
            and not re.match(r"[a-z]+:|/$", link)
        ]
    assert len(links) > 1000
    for page, link in links:
        path, _, anchor = link.partition("#")
        folder = built if path.startswith("/guide/") else page.parent
        target = (folder / path.removeprefix("/guide/")).resolve() if path else page
        target = target / "index.html" if target.is_dir() else target
        assert target.is_file(), f"{page}: {link}"
        assert not anchor or target.suffix != ".html" or anchor in ids[target], f"{page}: {link}"


def test_a_page_and_its_files_come_without_a_key(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as client:
        start = client.get("/guide", follow_redirects=True)
        assert start.url.path == "/guide/"
        assert "<h1" in start.text
        policy = start.headers["content-security-policy"]
        assert "unsafe-inline" not in policy
        assert "script-src 'self';" in policy
        (style, *_) = re.findall(r'href="(assets/stylesheets/[^"]+)"', start.text)
        told = client.get(f"/guide/{style}")
        assert told.headers["content-type"].startswith("text/css")
        again = client.get(f"/guide/{style}", headers={"if-none-match": told.headers["etag"]})
        assert again.status_code == 304
        assert client.get("/guide/console").headers["location"] == "/guide/console/"
        for odd in ("/guide/none", "/guide/..%2f..%2fsettings.py", "/guide/%00"):
            answer = client.get(odd)
            assert answer.status_code == 404, odd
            assert "import" not in answer.text
        assert client.get("/v1/models").status_code == 401


def test_the_wheel_holds_the_guide(built: Path) -> None:
    code = """
import setuptools  # brings distutils
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
command.ensure_finalized()
for package, source, build, names in command.data_files:
    if package == "loraplex_server":
        print(*names, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shipped = set(done.stdout.split())
    files = {path.relative_to(GUIDE.parent).as_posix() for path in built.rglob("*")}
    wanted = {name for name in files if (GUIDE.parent / name).is_file()}
    assert wanted <= shipped


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_page_works_in_a_browser_and_its_search_finds(page: Page, server: ServerProcess) -> None:
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/guide/")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Start")
    for words, first in (("rollback", "adapters-over-http"), ("migrate vllm", "coming-from")):
        page.get_by_label("Search", exact=True).first.fill("")
        page.get_by_label("Search", exact=True).first.press_sequentially(words)
        expect(page.locator(".md-search-result__link").first).to_have_attribute(
            "href", re.compile(rf"/guide/{first}")
        )
    page.keyboard.press("Escape")
    page.get_by_title("Dark", exact=True).click()
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")
    assert told == []
    assert asked
    assert all(url.startswith((server.url, "data:")) for url in asked)
