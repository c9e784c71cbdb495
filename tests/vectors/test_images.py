"""Image encoders as bases: what they serve, what they refuse, and that a bad image costs nobody."""

import asyncio
import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from loraplex_server.model.encoder.image_processor import ImageProcessor
from loraplex_server.model.encoder.loading import load_image_encoder
from loraplex_server.model.errors import ModelError
from tests.conformance.load import put_upload
from tests.support.bases.tiny_image_encoders import (
    data_url,
    picture,
    save_tiny_image_encoder,
)
from tests.vectors.conftest import Server, serving

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_CAT, _DOG = data_url(picture(1)), data_url(picture(2, 64, 64), "jpeg")
_LABELS = ["a cat", "the small dog", "tree"]


@pytest.fixture(scope="module")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_image_encoder("clip", tmp_path_factory.mktemp("images") / "clip")


@pytest.fixture(scope="module")
async def clip(
    clip_base: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[Server]:
    async with serving(clip_base, tmp_path_factory.mktemp("state")) as running:
        await running.put("tuned", _adapter(clip_base, tmp_path_factory.mktemp("tuned")))
        yield running


@pytest.fixture(scope="module")
async def vit(
    tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[Server]:
    """Yield a server of a ViT without an image processor, which no test here needs."""
    base = save_tiny_image_encoder("vit", tmp_path_factory.mktemp("vit"), processor=False)
    async with serving(base, tmp_path_factory.mktemp("state")) as running:
        yield running


def _adapter(base: Path, folder: Path, **options: Any) -> Path:
    torch.manual_seed(4)
    targets = {"target_modules": ["q_proj", "v_proj"], **options}
    tuned = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=4, **targets))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return folder


async def _refusal(server: Server, path: str, **body: Any) -> tuple[int, str, str]:
    answer = await server.post(path, **body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def _bomb() -> str:
    """A PNG whose header has 529 million pixels, in a few hundred bytes."""
    header = struct.pack(">IIBBBBB", 23_000, 23_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 70_000)))
    ]
    file = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


async def test_texts_and_images_of_one_call_keep_their_order(clip: Server) -> None:
    mixed = await clip.data(
        "/v1/embeddings", input=[_CAT, "a cat", {"image": _DOG}, {"text": "tree"}]
    )
    for item, value in zip(mixed, (_CAT, "a cat", _DOG, "tree"), strict=True):
        (alone,) = await clip.data("/v1/embeddings", input=value)
        assert torch.allclose(
            torch.tensor(item["embedding"]), torch.tensor(alone["embedding"]), atol=1e-6
        )


async def test_bare_base64_is_an_image_in_an_object(clip: Server) -> None:
    bare = _CAT.partition(",")[2]
    (one,), (other,) = [
        await clip.data("/v1/embeddings", input={"image": image}) for image in (bare, _CAT)
    ]
    assert one["embedding"] == other["embedding"]


async def test_dimensions_and_base64_are_as_of_texts(clip: Server) -> None:
    (whole,) = await clip.data("/v1/embeddings", input=_CAT, use_activation=False)
    (cut,) = await clip.data(
        "/v1/embeddings",
        input=_CAT,
        dimensions=5,
        encoding_format="base64",
        use_activation=False,
    )
    values = struct.unpack("<5f", base64.b64decode(cut["embedding"]))
    assert list(values) == pytest.approx(whole["embedding"][:5])
    status, _, message = await _refusal(clip, "/v1/embeddings", input=_CAT, dimensions=21)
    assert (status, "these vectors have 20" in message) == (400, True)


async def test_labels_are_read_once_for_each_adapter(clip: Server) -> None:
    async def ask(**body: Any) -> Any:
        answer = await clip.post(
            "/v1/classify/zero-shot", input=[_CAT, _DOG], template="a {} runs", **body
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    first, again = await ask(labels=_LABELS), await ask(labels=_LABELS)
    assert first["data"] == again["data"]
    n_images = 2 * 17
    assert first["usage"]["prompt_tokens"] > n_images == again["usage"]["prompt_tokens"]
    tuned = await ask(labels=_LABELS, adapter="tuned")
    assert tuned["usage"] == first["usage"]
    assert tuned["data"] != first["data"]
    salted = await ask(labels=_LABELS, cache_salt="mine")
    assert salted["usage"] == first["usage"]
    one_more = await ask(labels=["bright moon", *_LABELS])
    assert len(one_more["data"][0]["probs"]) == 4
    raw = await ask(labels=_LABELS, use_activation=False)
    probs = torch.tensor(raw["data"][1]["probs"]).softmax(-1)
    assert probs.tolist() == pytest.approx(first["data"][1]["probs"], abs=1e-5)
    assert first["data"][1]["label"] == _LABELS[int(probs.argmax())]


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("https://example.org/cat.png", 400, "remote_image_refused"),
        (_bomb(), 413, "image_too_large"),
        (_DOG[: len(_DOG) * 2 // 3], 400, "invalid_image"),
        ("bm8gaW1hZ2U=", 400, "invalid_image"),
        ("data:image/png;base64,***", 400, "invalid_image"),
    ],
    ids=["remote", "bomb", "broken", "no image", "no base64"],
)
async def test_a_bad_image_is_refused_by_name(
    clip: Server, image: str, status: int, code: str
) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": [{"image": _CAT}, {"image": image}]}),
        ("/v1/classify/zero-shot", {"input": [_CAT, image], "labels": _LABELS}),
    ):
        found, found_code, message = await _refusal(clip, path, **body)
        assert (found, found_code) == (status, code)
        assert message.startswith("input, image 1: ")


async def test_fifty_images_are_refused(clip: Server) -> None:
    for path, more in (("/v1/embeddings", {}), ("/v1/classify/zero-shot", {"labels": ["a"]})):
        status, code, message = await _refusal(clip, path, input=[_CAT] * 50, **more)
        assert (status, code) == (400, "too_many_images")
        assert "50 images are more than the 32" in message


async def test_others_are_answered_while_a_large_image_is_decoded(clip: Server) -> None:
    noise = torch.randint(256, (1800, 1800, 3), generator=torch.Generator().manual_seed(0))
    large = data_url(Image.fromarray(noise.to(torch.uint8).numpy()), "webp")
    slow = asyncio.create_task(clip.post("/v1/embeddings", input=[large]))
    n_answers = 0
    while not slow.done():
        await clip.data("/v1/embeddings", input="a cat")
        n_answers += 1
    assert (await slow).status_code == 200
    assert n_answers > 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"image": _CAT, "text": "a"}]}, "input"),
        ({"input": [{}]}, "input"),
        ({"input": [{"image": 3}]}, "input[0].image"),
        ({"input": {"image": None}}, "input"),
    ],
)
async def test_a_malformed_input_names_its_field(
    clip: Server, body: dict[str, Any], param: str
) -> None:
    answer = await clip.post("/v1/embeddings", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_template_needs_one_place_for_the_label(clip: Server) -> None:
    body = {"input": _CAT, "labels": _LABELS, "template": "a photo"}
    status, _, message = await _refusal(clip, "/v1/classify/zero-shot", **body)
    assert (status, "needs one {}" in message) == (400, True)


async def test_adapters_are_not_chosen_by_images(clip: Server) -> None:
    status, _, message = await _refusal(clip, "/v1/embeddings", input=_CAT, adapter="auto")
    assert (status, "name one" in message) == (400, True)


async def test_a_base_of_texts_names_what_it_lacks(server: Server) -> None:
    for given in (_CAT, {"image": _CAT}, ["a cat", _CAT]):
        assert await _refusal(server, "/v1/embeddings", input=given) == (
            400,
            "base_reads_no_images",
            "base reads no images as input; serve an image encoder, such as CLIP or ViT, for them",
        )
    body = {"input": _CAT, "labels": ["a"]}
    status, code, _ = await _refusal(server, "/v1/classify/zero-shot", **body)
    assert (status, code) == (400, "base_reads_no_images")


async def test_a_base_of_images_reads_no_texts(vit: Server) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": [5, 7]}),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        status, code, _ = await _refusal(vit, path, **body)
        assert (path, status, code) == (path, 400, "base_reads_images")
    status, _, message = await _refusal(vit, "/v1/embeddings", input=[{"text": "a"}])
    assert (status, "images alone" in message) == (400, True)
    status, code, _ = await _refusal(vit, "/v1/completions", prompt="a")
    assert (status, code) == (400, "base_is_encoder")


async def test_without_its_processor_a_base_reads_no_images(vit: Server) -> None:
    status, code, message = await _refusal(vit, "/classify", input=_CAT)
    assert (status, code) == (400, "no_image_processor")
    assert "preprocessor_config.json" in message


async def test_labels_need_a_base_with_both_towers(vit: Server) -> None:
    body = {"input": _CAT, "labels": _LABELS}
    status, code, message = await _refusal(vit, "/v1/classify/zero-shot", **body)
    assert (status, code) == (400, "base_reads_no_labels")
    assert "CLIP" in message


async def test_an_adapter_of_another_kind_of_base_is_refused(
    vit: Server, clip: Server, clip_base: Path, train: Any, tmp_path: Path
) -> None:
    text = train("SEQ_CLS").folder
    of_clip = _adapter(clip_base, tmp_path / "clip")
    for server, folder in ((vit, text), (clip, text), (vit, of_clip)):
        put = await put_upload(server.client, "other", folder)
        assert put.status == 400
        assert "config names the base" in put.message
        assert "the adapter does not fit" in put.message


async def test_a_base_that_embeds_takes_no_head(
    clip: Server, clip_base: Path, tmp_path: Path
) -> None:
    folder = _adapter(clip_base, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {"base_model.model.classifier.weight": torch.ones(2, 20)}
    save_file(tensors | head, folder / "adapter_model.safetensors")
    put = await put_upload(clip.client, "head", folder)
    assert put.status == 400
    assert "takes no classifier" in put.message


def test_a_processor_for_another_model_stops_the_start(tmp_path: Path) -> None:
    save_tiny_image_encoder("vit", tmp_path, image_size=48)
    processor = ImageProcessor.load(tmp_path)
    with pytest.raises(ModelError, match="makes images of 32 x 32 pixels, and the model reads 48"):
        load_image_encoder(
            tmp_path, "vit", processor, dtype=torch.float32, device=torch.device("cpu")
        )
