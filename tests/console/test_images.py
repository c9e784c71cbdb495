"""Images in the playground, in a real browser against a server whose base reads them."""

import base64
from pathlib import Path

import pytest
from openai import OpenAI
from playwright.sync_api import Page, expect

from tests.support.bases.tiny_vision import made_image, png, save_tiny_vision
from tests.support.servers.server_process import server_process

pytestmark = pytest.mark.slow


def test_an_image_is_chosen_shown_and_answered_as_the_api_does(page: Page, tmp_path: Path) -> None:
    image = png(made_image(3))
    with server_process(save_tiny_vision("llava", tmp_path / "base"), tmp_path / "state") as server:
        page.goto(f"{server.url}/#/playground")
        file = {"name": "a.png", "mimeType": "image/png", "buffer": base64.b64decode(image)}
        page.get_by_label("Images: choose, drop or paste").set_input_files([file, file])  # type: ignore[list-item]
        page.get_by_role("button", name="Remove image 2").click()
        expect(page.get_by_alt_text("Image 1")).to_be_visible()
        assert page.get_by_alt_text("Image 1").evaluate("image => image.naturalWidth") > 0
        page.get_by_label("Prompt", exact=True).fill("What is it?")
        page.get_by_text("Settings", exact=True).click()
        page.get_by_label("Max tokens").fill("8")
        page.get_by_role("button", name="Ask all").click()
        expect(page.get_by_role("button", name="Ask all")).to_be_visible(timeout=120_000)
        shown = page.locator("section[aria-label^=Answer] .answer").inner_text()
        url = f"data:image/png;base64,{image}"
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
            parts = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What is it?"},
            ]
            answer = client.chat.completions.create(
                model="base",
                messages=[{"role": "user", "content": parts}],  # type: ignore[list-item,misc]
                temperature=0,
                max_tokens=8,
            )
    text = (answer.choices[0].message.content or "").strip()
    assert shown.strip() == (text or "(empty)")
