"""Prepared images: how much of them a context and the memory can hold."""

import asyncio
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loraplex_server.errors import ApiError
from loraplex_server.images import ImageLimits
from loraplex_server.model.vision.prompt_image import Block, PromptImage, prefix_key_ids
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


def test_keys_within_a_block_depend_on_all_of_it() -> None:
    def keys(text: list[int], block: tuple[int, int]) -> list[int]:
        image = PromptImage(b"digest", {}, (1, 2, 3), block=Block(*block, has_windows=True))
        return prefix_key_ids([7, 300, 300, 300, *text], [image])

    whole = (0, 6)  # as PaliGemma reads a prompt: a later word changes the first token's state
    first, other = keys([4, 5], whole), keys([4, 6], whole)
    assert all(a != b for a, b in zip(first, other, strict=True))
    own = (1, 4)  # as Gemma 3 does
    first, other = keys([4, 5], own), keys([4, 6], own)
    assert first[:-1] == other[:-1]
    assert first[:1] + first[4:] == [7, 4, 5]


def test_the_token_that_embeddings_replace_is_refused_in_texts(tmp_path: Path) -> None:
    prompts = ImagePrompts.of(save_tiny_vision("gemma3", tmp_path))
    assert prompts is not None
    image = prompts.read(png(made_image(1)), ImageLimits())
    assert prompts.expand("a <start_of_image> b", [image]) == f"a {image.text} b"
    with pytest.raises(ApiError, match="2 placeholders '<image>'") as refused:
        prompts.expand("a <start_of_image> <image>", [image])
    assert refused.value.code == "image_placeholders"
