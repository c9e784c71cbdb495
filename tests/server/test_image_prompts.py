"""Prepared images: how much of them a context and the memory can hold."""

import asyncio
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loraplex_server.errors import ApiError
from loraplex_server.images import ImageLimits
from loraplex_server.tenant_shares import TenantThreads
from loraplex_server.text.image_prompts import ImagePrompts
from loraplex_server.text.text_pipeline import TextPipeline
from tests.support.bases.tiny_vision import made_image, png, save_tiny_vision

_PIXEL_BYTES = 3 * 32 * 32 * 4  # of an image in the tower


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vision("llava", tmp_path_factory.mktemp("base"))


def test_images_beyond_the_context_are_refused_before_the_next_is_read(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    sources = [png(made_image(1)), png(made_image(2)), "no image, and never read"]

    async def read() -> None:
        threads = TenantThreads("images", 1, 1)
        images = ImagePrompts.of(path)
        text = TextPipeline(tokenizer, max_model_len=20, images=images, image_threads=threads)
        try:
            await text.read_images(sources, ImageLimits(), tenant="")
        finally:
            await text.close()
            threads.close()

    with pytest.raises(ApiError, match="the first 2 images take 32 tokens") as refused:
        asyncio.run(read())
    assert refused.value.code == "context_length_exceeded"


def test_images_wait_while_others_take_the_memory(path: Path) -> None:
    prompts = ImagePrompts.of(path, max_bytes=2 * _PIXEL_BYTES)
    assert prompts is not None
    sources = [png(made_image(seed)) for seed in range(3)]
    held = [prompts.read(source, ImageLimits()) for source in sources[:2]]
    with pytest.raises(ApiError) as refused:
        prompts.read(sources[2], ImageLimits())
    assert (refused.value.status, refused.value.code) == (503, "images_busy")
    held.pop()
    assert prompts.read(sources[2], ImageLimits()).text == "<image>" * 16
