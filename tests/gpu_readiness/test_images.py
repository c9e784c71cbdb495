"""Steps with images on the stand-in for a GPU: the tower runs there, once for each adapter."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

from loraplex_server.model.vision.prompt_image import PromptImage
from tests.conformance.oracle import make_peft
from tests.conformance.peft_row import PeftRow, moved
from tests.support.bases.tiny_models import read_path, untouched
from tests.support.bases.tiny_vision import IMAGE_ID, save_tiny_vision
from tests.support.gpu.meta_engine import Wish, base_on_host, meta_engine

_N_TOKENS = 16  # of an image


def _wish(digest: bytes, plan: object = None) -> Wish:
    pixels = torch.zeros(1, 3, 32, 32)
    image = PromptImage(digest, {"pixel_values": pixels}, tuple(range(2, 2 + _N_TOKENS)))
    return Wish(plan, (5, 9, *[IMAGE_ID] * _N_TOKENS, 7), images=(image,))  # type: ignore[arg-type]


def test_images_and_their_adapters_run_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(save_tiny_vision("llava", tmp_path / "b"))
    row = PeftRow("all", lambda: LoraConfig(r=4, target_modules="all-linear"), moved(0.1))
    make_peft(row, untouched(model), tmp_path / "a")
    plan = read_path(tmp_path / "a", model).plan
    base = base_on_host(model.eval(), monkeypatch)
    with meta_engine(base, monkeypatch) as engine:
        run = engine.run([_wish(b"one"), _wish(b"two"), _wish(b"one", plan), _wish(b"one")])
    assert run.errors == []
    assert run.findings == []
    assert all(len(answer.token_ids) > 0 for answer in run.answers)
    n_convolutions = sum(step.kernels.count("convolution") for step in run.steps)
    assert n_convolutions == 3  # images one and two of the base, and one under the adapter
