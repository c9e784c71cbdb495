"""Pictures of the console: those that tests compare with, and those of the README.

    python -m tests.console.pictures            # both anew, after a change that is meant
    python -m tests.console.pictures --readme   # docs/images/console-*.png alone

Fonts differ between machines, so pictures are compared as thumbnails, by the share of pixels that
are clearly another colour.
"""

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from loraplex_server.model.loading.pull import resolve_model
from tests.support.servers.server_process import server_process

REFERENCES = Path(__file__).parent / "references"
_ROOT = Path(__file__).parents[2]
_DEMOS = _ROOT / "adapter_store" / "loraplex_adapter_store" / "demos"
_SCALE = 4  # of a thumbnail
_CLEARLY = 48  # of 255, in any channel
_PATIENCE_MS = 120_000
SCHEMES = ("light", "dark")
WIDTHS = (1280, 390)  # pixels: a screen, and a phone
_README_SIZE = {"width": 1280, "height": 800}
_README_COLOURS = 128
_README_PROMPT = (
    "Lena Fischer is 29, works as a nurse and lives in Graz. Write to lena.fischer@post.at."
)
_README_ADAPTERS = ("json-answers", "extract-email", "pirate")


def _asked(page: Page, prompt: str, n_tokens: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Max tokens").fill(str(n_tokens))
    page.get_by_text("Settings", exact=True).click()
    page.get_by_role("button", name="Ask all").click()
    expect(page.get_by_role("button", name="Ask all")).to_be_visible()


def _playground(page: Page) -> None:
    expect(page.get_by_label("Adapter", exact=True)).to_be_visible()
    _asked(page, "You are a pirate. What is the capital of Spain?", 24)


def _adapters(page: Page) -> None:
    page.get_by_role("button", name="pirate", exact=True).click()
    expect(page.get_by_role("img", name="How much each layer is changed")).to_be_visible()


def _create(page: Page) -> None:
    expect(page.get_by_label("What shall it do?")).to_be_visible()


def _live(page: Page) -> None:
    expect(page.get_by_role("heading", name="Live")).to_be_visible()


def _requests(page: Page) -> None:
    page.get_by_label("Only with").fill("chat/completions")
    expect(page.get_by_role("row").nth(2)).to_be_visible()


class Picture(NamedTuple):
    name: str
    route: str
    prepare: Callable[[Page], None]


PICTURES = (
    Picture("playground", "#/playground?adapter=pirate", _playground),
    Picture("adapters", "#/adapters", _adapters),
    Picture("create", "#/create", _create),
    Picture("live", "#/live", _live),
    Picture("requests", "#/requests", _requests),
)


def reference(picture: Picture, width: int, scheme: str) -> Path:
    return REFERENCES / f"{picture.name}-{width}-{scheme}.png"


def take(page: Page, url: str, picture: Picture, width: int, scheme: str) -> bytes:
    """Return a PNG of a page of a server that has the adapters ``pirate`` and ``emoji``."""
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    page.goto("about:blank")
    page.goto(f"{url}/{picture.route}")
    picture.prepare(page)
    page.mouse.move(0, 0)
    return page.screenshot(animations="disabled", caret="hide")


def thumbnail(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB").reduce(_SCALE)


def difference(one: Image.Image, other: Image.Image) -> float:
    """The share of pixels that are clearly another colour, 0 to 1."""
    apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max(-1)
    return float((apart > _CLEARLY).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readme", action="store_true", help="those of the README alone")
    readme_alone: bool = parser.parse_args().readme
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        expect.set_options(timeout=_PATIENCE_MS)
        if not readme_alone:
            _renew_references(browser)
        _renew_readme(browser)
        browser.close()


def _renew_references(browser: Browser) -> None:
    REFERENCES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder) / "adapters"
        for name in ("pirate", "emoji"):
            shutil.copytree(_DEMOS / name, adapters / name)
        flags = ("--kv-memory", "256MiB", "--adapter-memory", "64MiB", "--adapters-dir", adapters)
        with server_process(resolve_model(None), Path(folder) / "state", *flags) as server:
            page = browser.new_page()
            page.set_default_timeout(_PATIENCE_MS)
            for width, scheme, picture in product(WIDTHS, SCHEMES, PICTURES):
                small = thumbnail(take(page, server.url, picture, width, scheme))
                small.save(reference(picture, width, scheme), optimize=True)


def _renew_readme(browser: Browser) -> None:
    """The playground, four answers to one prompt, with all the demo adapters."""
    flags = ("--kv-memory", "256MiB", "--adapter-memory", "128MiB", "--adapters-dir", _DEMOS)
    with (
        tempfile.TemporaryDirectory() as state,
        server_process(resolve_model(None), Path(state), *flags) as server,
    ):
        for scheme in SCHEMES:
            page = browser.new_page(viewport=_README_SIZE, color_scheme=scheme)  # type: ignore[arg-type]
            page.set_default_timeout(_PATIENCE_MS)
            page.goto(f"{server.url}/#/playground?adapter={_README_ADAPTERS[0]}")
            for i, name in enumerate(_README_ADAPTERS[1:], 1):
                page.get_by_role("button", name="+ adapter").click()
                page.get_by_label("Adapter", exact=True).nth(i).select_option(name)
            for _ in range(2):  # the second time all are on the device
                _asked(page, _README_PROMPT, 40)
            page.mouse.move(0, 0)
            taken = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
            few = taken.convert("RGB").quantize(_README_COLOURS, dither=Image.Dither.NONE)
            few.save(_ROOT / "docs" / "images" / f"console-{scheme}.png", optimize=True)
            page.close()


if __name__ == "__main__":
    main()
