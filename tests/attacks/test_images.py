"""Floods of pictures: large ones in small files, and files that only pretend to be pictures."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.attacks.conftest import bystander, peak_memory, stream
from tests.attacks.two_tenants import Neighbours, Tenant, two_tenants, waited
from tests.support.bases.tiny_vision import made_image, png, save_tiny_vision
from tests.support.bounds import broken_only_if_each_time, check_below

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_SIDE = 3500  # pixels: 37 MB in RGB, of a file of 14 KB


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbours]:
    folder = tmp_path_factory.mktemp("images")
    with two_tenants(folder, save_tiny_vision("llava", folder / "model")) as both:
        yield both


def _chat(tenant: Tenant, pictures: list[str], *statuses: int) -> Any:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        for picture in pictures
    ]
    parts.append({"type": "text", "text": "What is it?"})
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    return tenant.post("/v1/chat/completions", body, *statuses)


def _large(shade: int) -> str:
    """A new picture of a file that is small: the content of each has its own key in the caches."""
    return png(Image.new("RGB", (_SIDE, _SIDE), (shade, 0, 0)))


@broken_only_if_each_time
def test_large_pictures_of_one_tenant_delay_no_other(neighbours: Neighbours) -> None:
    """A picture waits for one of the other tenant's, and so does none of its tokens."""
    pictures = iter([_large(shade) for shade in range(12)])
    chats = [[next(pictures) for _ in range(3)] for _ in range(4)]
    flood = [lambda chat=chat: _chat(neighbours.flood, chat) for chat in chats]
    small = png(made_image(1))
    url = neighbours.server.url
    with (
        bystander(url, "/v1/models", "small"),
        stream(url, key="small", max_tokens=900) as gaps,
        peak_memory(neighbours.server, below_bytes=1 << 30),
    ):
        share = waited(flood, lambda: _chat(neighbours.small, [small]))
    check_below(share, 0.4, "of the flood")
    check_below(max(gaps), 1.0, "s between tokens")


def test_files_that_pretend_are_refused_and_cost_no_memory(neighbours: Neighbours) -> None:
    """A header that promises 20,000 x 20,000 pixels, half a picture, and what is none."""
    whole = base64.b64decode(png(made_image(2)))
    claims = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(claims, "PNG", compress_level=9)
    bombs = [claims.getvalue(), whole[: len(whole) // 2], b"\x89PNG\r\n\x1a\n" * 1000]
    with (
        bystander(neighbours.server.url, "/v1/models", "small"),
        peak_memory(neighbours.server, below_bytes=200 << 20),
    ):
        codes = [_refusal(neighbours, [base64.b64encode(bomb).decode()]) for bomb in bombs]
        codes.append(_refusal(neighbours, [png(made_image(3))] * 50))
    assert codes == ["image_too_large", "invalid_image", "invalid_image", "too_many_images"]


def _refusal(neighbours: Neighbours, pictures: list[str]) -> str:
    code: str = _chat(neighbours.flood, pictures, 400, 413)["error"]["code"]
    return code
