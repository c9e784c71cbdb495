"""`loraplex train` on folders of images: the server answers what PEFT computes from the files."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from typer.testing import CliRunner

from loraplex_server.cli.app import app
from loraplex_training.config import IMAGE_FAMILIES
from research.few_shot.drawings import COLOURS, NEW, SHAPES, write_folder
from research.few_shot.drawn_clip import save_drawn_clip
from tests.support.bases.tiny_image_encoders import data_url
from tests.vectors.conftest import Server, serving

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# Words that the base has not seen, for what it has seen.
_CLASSES = {
    name: [f"{colour} {shape}" for shape in SHAPES]
    for name, colour in zip(NEW[:3], COLOURS, strict=False)
}
_TEMPLATE = "a photo of a {}."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a CLIP, and with images to learn from and others to test."""
    folder = tmp_path_factory.mktemp("few-shot")
    write_folder(folder / "train", _CLASSES, 4, seed=0)
    write_folder(folder / "test", _CLASSES, 6, seed=1)
    save_drawn_clip(folder / "base", steps=80)
    return folder


def _train(place: Path, family: str, *options: str, data: str = "train") -> Any:
    out = ("--out", str(place / family), "--base", str(place / "base"), "--family", family)
    return CliRunner().invoke(app, ["train", str(place / data), *out, *options])


@pytest.fixture(scope="module")
async def server(place: Path, anyio_backend: str) -> AsyncIterator[Server]:
    async with serving(place / "base", place / "state") as running:
        yield running


def _test_images(place: Path) -> Iterator[tuple[Image.Image, str]]:
    for path in sorted((place / "test").rglob("*.png")):
        yield Image.open(path).convert("RGB"), path.parent.name


def _oracle(place: Path, adapter: Path, images: list[Image.Image], labels: list[str]) -> Tensor:
    tuned = PeftModel.from_pretrained(CLIPModel.from_pretrained(place / "base"), adapter)
    assert isinstance(tuned.peft_config["default"], peft.LoraConfig)
    texts = [_TEMPLATE.format(label) for label in labels]
    tokens = AutoTokenizer.from_pretrained(place / "base")(texts, return_tensors="pt")
    processor = AutoImageProcessor.from_pretrained(place / "base", backend="pil")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits: Tensor = tuned.eval()(pixel_values=pixels, **tokens).logits_per_image
    return logits.softmax(-1)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
async def test_a_few_images_of_each_label_make_an_adapter_that_peft_and_the_server_read_alike(
    place: Path, server: Server, family: str
) -> None:
    steps = ("--steps", "30", "--lr", "0.02", "--val", str(place / "test"))
    result = _train(place, family, *steps)
    assert result.exit_code == 0, result.output
    card = await server.put(family, place / family)
    assert card["description"] == "Tells apart five, seven, six in images."
    images, truth = zip(*_test_images(place), strict=True)
    labels = sorted(_CLASSES)
    body = {"labels": labels, "template": _TEMPLATE, "input": [data_url(i) for i in images]}
    answers = {
        name: await server.data("/v1/classify/zero-shot", **body, **adapter)
        for name, adapter in (("base", {}), ("tuned", {"adapter": family}))
    }
    probs = torch.tensor([answer["probs"] for answer in answers["tuned"]])
    expected = _oracle(place, place / family, list(images), labels)
    assert (probs - expected).abs().max() < 1e-4
    right = {
        name: sum(answer["label"] == label for answer, label in zip(own, truth, strict=True))
        for name, own in answers.items()
    }
    assert right["tuned"] > right["base"] + 4
    shares = (f"{n / len(truth):.3f}" for n in (right["tuned"], right["base"]))
    assert "accuracy {}; the base alone: {}".format(*shares) in result.output


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("lora", (), "family 'lora' does not learn from images; choose clip-lora"),
        ("clip-lora", ("--max-len", "9"), "--max-len is for chats"),
        ("clip-lora", ("--template", "a photo"), "needs one {}"),
        ("clip-lora", ("--val", "{place}/odd"), "a class 'tree' that was not trained"),
        ("clip-lora", ("--val", "0.2"), "0.2 is not a folder"),
        ("clip-lora", ("--targets", "query"), "no linear of the base is called query"),
        ("block-lora", ("--rank", "2"), "n_blocks is 4, must divide 2"),
        ("clip-lora", ("--base", "{place}/text"), "is a bert, and classes of images"),
    ],
)
def test_a_run_that_cannot_learn_names_the_reason(
    place: Path, family: str, options: tuple[str, ...], words: str
) -> None:
    _folder(place / "odd", {"tree": ["red bar"], "five": ["red bar"]})
    (place / "text").mkdir(exist_ok=True)
    (place / "text" / "config.json").write_text('{"model_type": "bert"}')
    given = [option.format(place=place) if "place" in option else option for option in options]
    result = _train(place, family, "--overwrite", *given)
    assert (result.exit_code, words in result.output) == (1, True), result.output


def test_a_folder_names_the_image_that_cannot_be_read(place: Path) -> None:
    folder = _folder(place / "broken", {"a": ["red bar"], "b": ["blue bar"]})
    (folder / "b" / "000.png").write_bytes(b"no image")
    result = _train(place, "clip-lora", "--overwrite", data="broken")
    assert (result.exit_code, "b/000.png cannot be read as an image" in result.output) == (1, True)
    (folder / "b" / "000.png").unlink()
    result = _train(place, "clip-lora", "--overwrite", data="broken")
    assert "broken/b has no image" in result.output


def test_a_finished_adapter_is_not_replaced_unasked(place: Path, tmp_path: Path) -> None:
    (place / "glad").mkdir(exist_ok=True)
    (place / "glad" / "adapter_config.json").write_text("{}")
    result = _train(place, "glad")
    assert (result.exit_code, "give --overwrite" in result.output) == (1, True)


def test_families_of_images_do_not_learn_chats(place: Path) -> None:
    (place / "chats.jsonl").write_text("")
    result = _train(place, "clip-lora", data="chats.jsonl")
    assert (result.exit_code, "learns from a folder of images" in result.output) == (1, True)
    result = _train(place, "lora", "--template", "a {}", data="chats.jsonl")
    assert (result.exit_code, "--template is for images" in result.output) == (1, True)


def _folder(folder: Path, labels: dict[str, list[str]]) -> Path:
    return folder if folder.is_dir() else write_folder(folder, labels, 1, seed=2)
