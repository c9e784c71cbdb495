"""Adapters of parts that a base does not have are a 400 that names the part and costs nothing."""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from loraplex_server.model.errors import ModelError
from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.tiny_base import app_of, save_base, tiny_engine_config
from tests.support.bases.tiny_encoders import save_tiny_encoder
from tests.support.bases.tiny_image_encoders import data_url, picture, save_tiny_image_encoder
from tests.support.bases.tiny_vision import made_image, png, save_tiny_vision
from tests.support.servers.served_app import served_app


def _llama(folder: Path) -> Path:
    return save_base(next(row for row in BASE_ROWS if row.id == "llama"), folder)


_CHAT = {"max_tokens": 4, "temperature": 0, "logprobs": True}
_SEEN = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(made_image(1))}"}}
_MADE: Mapping[str, Callable[[Path], Path]] = {
    "llama": _llama,
    "llava": lambda folder: save_tiny_vision("llava", folder),
    "bert": lambda folder: save_tiny_encoder("bert", folder),
    "clip": lambda folder: save_tiny_image_encoder("clip", folder),
    "vit": lambda folder: save_tiny_image_encoder("vit", folder),
}
_LOADED: Mapping[str, Any] = {
    "llama": AutoModelForCausalLM,
    "llava": AutoModelForImageTextToText,
    "bert": AutoModel,
    "clip": AutoModel,
    "vit": AutoModel,
}
# A question that each base answers, to show that a refused adapter costs others nothing.
_ASKED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("/v1/completions", {"prompt": "Hello", **_CHAT, "logprobs": 0}),
    "llava": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [_SEEN]}], **_CHAT},
    ),
    "bert": ("/classify", {"input": "the small cat"}),
    "clip": ("/v1/embeddings", {"input": [{"image": data_url(picture(1, 40, 30))}]}),
    "vit": ("/v1/embeddings", {"input": [{"image": data_url(picture(1, 40, 30))}]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bases")
    return {name: make(folder / name) for name, make in _MADE.items()}


@pytest.fixture(scope="module")
def urls(
    bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """Return a function from the name of a base to the address of its server."""
    folder = tmp_path_factory.mktemp("states")
    started: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def url(name: str) -> str:
            if name not in started:
                app = stack.enter_context(app_of(bases[name], folder / name, tiny_engine_config()))
                started[name] = stack.enter_context(served_app(app))
            return started[name]

        yield url


def _files(base: Path, kind: str, targets: Any, folder: Path) -> dict[str, bytes]:
    """Return the files of a LoRA that PEFT saves for the base in ``base``."""
    model: PreTrainedModel = _LOADED[kind].from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        tuned.save_pretrained(folder)
    return {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }


def _answer(url: str, base: str) -> Any:
    path, body = _ASKED[base]
    answer = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return told.get("choices") or told["data"]


@pytest.mark.parametrize(
    ("trained_on", "targets", "base", "part"),
    [
        ("llava", r".*vision_tower.*q_proj", "llama", "vision_tower"),
        ("llava", r".*multi_modal_projector.*linear_1", "llama", "multi_modal_projector"),
        ("llava", "all-linear", "bert", "language_model"),
        ("bert", ["query", "value"], "llava", "encoder.layer.0.attention.self.query"),
        ("bert", ["query", "value"], "clip", "encoder.layer.0.attention.self.query"),
        ("clip", r"text_model.*q_proj", "vit", "text_model"),
        ("clip", ["q_proj"], "llava", "text_model"),
        ("vit", ["q_proj", "query"], "bert", "layers.0"),
        ("llama", ["q_proj"], "vit", "self_attn.q_proj"),
        ("llama", ["q_proj"], "bert", "self_attn.q_proj"),
        ("llama", ["q_proj"], "llava", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_an_adapter_of_another_bases_parts_is_refused_by_name(
    trained_on: str,
    targets: Any,
    base: str,
    part: str,
    bases: Mapping[str, Path],
    urls: Callable[[str], str],
    tmp_path: Path,
) -> None:
    files = _files(bases[trained_on], trained_on, targets, tmp_path)
    url = urls(base)
    before = _answer(url, base)
    put = httpx.put(f"{url}/v1/adapters/stranger", files=files, timeout=60)
    assert put.status_code == 400, put.text
    assert part in put.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/adapters/stranger").status_code == 404
    path, body = _ASKED[base]
    missing = httpx.post(f"{url}{path}", json={**body, "adapter": "stranger"}, timeout=60)
    assert missing.status_code == 404
    assert _answer(url, base) == before


def test_a_vision_language_model_without_its_processor_does_not_start(
    tmp_path: Path, bases: Mapping[str, Path]
) -> None:
    path = tmp_path / "base"
    shutil.copytree(bases["llava"], path)
    (path / "processor_config.json").unlink()
    with (
        pytest.raises(ModelError, match=r"no image processor.*preprocessor_config\.json"),
        app_of(path, tmp_path / "state", tiny_engine_config()),
    ):
        pass
