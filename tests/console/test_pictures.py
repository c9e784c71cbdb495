"""The pages look as their reference pictures do, light and dark, on a screen and on a phone.

After a change that is meant: python -m tests.console.pictures
"""

from itertools import product

import pytest
from PIL import Image
from playwright.sync_api import Page

from tests.console.pictures import (
    PICTURES,
    SCHEMES,
    WIDTHS,
    Picture,
    difference,
    reference,
    take,
    thumbnail,
)
from tests.support.servers.server_process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
TOLERATED = 0.06  # share of pixels; other fonts and times of answers


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("picture", PICTURES, ids=[picture.name for picture in PICTURES])
def test_a_page_looks_as_its_picture(
    page: Page, server: ServerProcess, picture: Picture, width: int, scheme: str
) -> None:
    taken = thumbnail(take(page, server.url, picture, width, scheme))
    told = Image.open(reference(picture, width, scheme)).convert("RGB")
    assert difference(taken, told) < TOLERATED


def test_a_page_without_its_styles_does_not(page: Page, server: ServerProcess) -> None:
    page.route("**/console.css", lambda route: route.abort())
    taken = thumbnail(take(page, server.url, PICTURES[0], 1280, "light"))
    told = Image.open(reference(PICTURES[0], 1280, "light")).convert("RGB")
    assert difference(taken, told) > 2 * TOLERATED


def test_light_is_not_dark() -> None:
    for width, picture in product(WIDTHS, PICTURES):
        light, dark = (
            Image.open(reference(picture, width, scheme)).convert("RGB") for scheme in SCHEMES
        )
        assert difference(light, dark) > 0.5
