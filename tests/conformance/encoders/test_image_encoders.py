"""Every image encoder over HTTP, alone and under adapters of each kind, against PEFT.

All adapters, images and texts are asked at once, so that they share steps.
"""

import asyncio
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
)

from tests.conformance.encoders.image_rows import IMAGE_ROWS, ImageAdapter, ImageRow
from tests.conformance.load import put_upload
from tests.conformance.tiny_base import serving
from tests.support.bases.tiny_image_encoders import (
    TWO_TOWERS,
    data_url,
    picture,
    save_tiny_image_encoder,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_TOLERANCE = 1e-4
_MATTERS = 0.005
_N_LABELS = 3
_SIZES = ((45, 30), (64, 64), (20, 33))
_LABELS = ("a cat", "the small dog runs", "tree")
_Answers = Mapping[tuple[str, str], Tensor]  # (adapter, question) → numbers


@pytest.mark.parametrize("row", IMAGE_ROWS, ids=lambda row: row.id)
def test_an_image_encoder_answers_as_peft_does(row: ImageRow, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = save_tiny_image_encoder(row.id, tmp_path / "base")
    images = [picture(seed, *size) for seed, size in enumerate(_SIZES)]
    oracle = _Oracle(row.id, base, images)
    expected: dict[tuple[str, str], Tensor] = {}
    for kind in row.kinds:
        expected |= {(f"base-{kind}", q): a for q, a in oracle.answers(oracle.model(kind)).items()}
    for adapter in row.adapters():
        model = _trained(adapter, oracle, tmp_path / adapter.id)
        expected |= {(adapter.id, q): a for q, a in oracle.answers(model).items()}
    found = asyncio.run(_ask(base, tmp_path, row, images, list(expected)))
    problems = []
    for (name, question), answer in expected.items():
        off = float((found[name, question] - answer).abs().max())
        if not off <= _TOLERANCE:
            problems.append(f"{name}: {question} is off by {off:.1e}")
    for adapter in row.adapters():
        base_of = f"base-{adapter.kind}"
        moved = [
            float((found[adapter.id, q] - a).abs().max())
            for (name, q), a in found.items()
            if name == base_of and a.shape == found[adapter.id, q].shape
        ]
        if moved and max(moved) < _MATTERS:
            problems.append(f"{adapter.id}: the adapter changes nothing")
    assert problems == []


class _Oracle:
    """transformers' own classes and processors."""

    def __init__(self, model_type: str, base: Path, images: list[Image.Image]) -> None:
        self.base, self.has_texts = base, model_type in TWO_TOWERS
        processor = AutoImageProcessor.from_pretrained(base, backend="pil")
        self._pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        if self.has_texts:
            tokenizer = AutoTokenizer.from_pretrained(base)
            pads = "max_length" if model_type == "siglip" else True
            self._texts = tokenizer(list(_LABELS), padding=pads, return_tensors="pt")

    def model(self, kind: str, **options: Any) -> Any:
        classes = {"classifier": AutoModelForImageClassification}
        return classes.get(kind, AutoModel).from_pretrained(self.base, **options).eval()

    @torch.no_grad()
    def answers(self, model: Any) -> dict[str, Tensor]:
        """Question → what the model answers: logits, embeddings, or probabilities of labels."""
        if self.has_texts:
            output = model(**self._texts, pixel_values=self._pixels)
            logits, is_clip = output.logits_per_image, "logit_bias" not in dir(_inner(model))
            probs = logits.softmax(-1) if is_clip else logits.sigmoid()
            return {
                **{f"image {i}": row for i, row in enumerate(output.image_embeds)},
                **{f"text {i}": row for i, row in enumerate(output.text_embeds)},
                **{f"zero-shot {i}": row for i, row in enumerate(probs)},
            }
        output = model(pixel_values=self._pixels)
        if hasattr(output, "logits"):
            return {f"class {i}": row for i, row in enumerate(output.logits)}
        rows = torch.nn.functional.normalize(output.last_hidden_state[:, 0], dim=-1)
        return {f"image {i}": row for i, row in enumerate(rows)}


def _inner(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def _trained(adapter: ImageAdapter, oracle: _Oracle, folder: Path) -> peft.PeftModel:
    options: dict[str, Any] = {}
    if adapter.kind == "classifier":
        options = {"num_labels": _N_LABELS, "ignore_mismatched_sizes": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(oracle.model(adapter.kind, **options), adapter.config())
        generator = torch.Generator().manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder)
    return tuned.eval()


async def _ask(
    base: Path,
    folder: Path,
    row: ImageRow,
    images: list[Image.Image],
    questions: list[tuple[str, str]],
) -> _Answers:
    random.Random(3).shuffle(questions)
    urls = [data_url(image) for image in images]
    async with serving(base, folder / "state") as client:
        for adapter in row.adapters():
            put = await put_upload(client, adapter.id, folder / adapter.id)
            assert put.status == 201, f"{adapter.id}: {put.message}"
        answers = await asyncio.gather(*(_answer(client, urls, *q) for q in questions))
    return dict(zip(questions, answers, strict=True))


async def _answer(client: httpx.AsyncClient, urls: list[str], name: str, question: str) -> Tensor:
    what, index = question.split()
    url, label = urls[int(index)], _LABELS[int(index)]
    path, key, body = {
        "class": ("/classify", "probs", {"input": url, "use_activation": False}),
        "image": ("/v1/embeddings", "embedding", {"input": [{"image": url}]}),
        "text": ("/v1/embeddings", "embedding", {"input": label}),
        "zero-shot": ("/v1/classify/zero-shot", "probs", {"input": url, "labels": [*_LABELS]}),
    }[what]
    if not name.startswith("base-"):
        body["adapter"] = name
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, f"{name}: {answer.text}"
    return torch.tensor(answer.json()["data"][0][key])
