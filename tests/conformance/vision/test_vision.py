"""Vision-language bases over HTTP, alone and under adapters, against transformers and PEFT.

The oracle reads the same images through the model's own processor.
"""

import asyncio
import copy
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import httpx
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import (
    AutoModelForImageTextToText,
    Gemma3ForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from tests.conformance.expert_rows import EXPERT_ROWS
from tests.conformance.load import put_upload
from tests.conformance.oracle import make_peft, patched
from tests.conformance.own_row import Random
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import serving
from tests.conformance.vision.vision_rows import VISION_ROWS, VisionRow
from tests.support.bases.tiny_vision import (
    IMAGE_ID,
    made_image,
    png,
    processor_of,
    save_tiny_vision,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # PaliGemma's processor makes an array of a tensor
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_N_TOKENS = 5
_TOLERANCE = 1e-4
_MATTERS = 0.02


def _configs(row: VisionRow) -> dict[str, peft.PeftConfig]:
    """Return the adapters: on the trunk alone, and on every part of the model."""
    trunk = rf".*\.{row.trunk}\..*\.(q_proj|v_proj|down_proj)"
    configs: dict[str, peft.PeftConfig] = {
        "trunk-lora": peft.LoraConfig(r=4, target_modules=trunk),
        "trunk-dora": peft.LoraConfig(r=4, use_dora=True, target_modules=trunk),
        "all-linear": peft.LoraConfig(r=4, target_modules="all-linear"),
        "rslora-patterns": peft.LoraConfig(
            r=4, use_rslora=True, target_modules="all-linear", rank_pattern={"v_proj": 2}
        ),
        "dora-everywhere": peft.LoraConfig(
            r=4, use_dora=True, target_modules=["q_proj", "v_proj", "fc1"]
        ),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]
        ),
        "norms": peft.LNTuningConfig(target_modules=["layer_norm1", "input_layernorm"]),
    }
    if row.saves_projector:
        configs["saved-projector"] = peft.LoraConfig(
            r=4, target_modules=trunk, modules_to_save=[row.projector]
        )
    return configs


@dataclass(frozen=True)
class _Case:
    text: str
    images: tuple[int, ...]  # seeds
    adapter: str = ""

    @property
    def pictures(self) -> list[Image.Image]:
        return [made_image(seed) for seed in self.images]

    def messages(self) -> list[dict[str, object]]:
        """Return the chat as OpenAI's clients send it."""
        parts: list[dict[str, object]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}}
            for image in self.pictures
        ]
        content = [*parts, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": content if self.images else self.text}]


_TWO = "What differs between the two?"
_CASES = (
    _Case("Hello, world!", ()),
    _Case("What is in the picture?", (1,)),
    _Case("What is in the picture?", (2,)),  # the same text, of another image
    _Case(_TWO, (1, 2)),
    _Case(_TWO, (2, 1)),
)
_HEAD = "saved-head"


@dataclass(frozen=True)
class _Answer:
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    prompt_ids: Sequence[int]
    prompt_logprobs: Sequence[float]  # of each token after the first; empty unless asked


@dataclass
class _Served:
    base: PreTrainedModel
    processor: Any
    models: Mapping[str, torch.nn.Module]
    answers: Mapping[_Case, _Answer]
    classifier: torch.nn.Module  # the base with the saved head
    logits: Mapping[_Case, Sequence[float]]  # of classes, by the saved head


@cache
def _served(row: VisionRow, folder: Path) -> _Served:
    path = save_tiny_vision(row.id, folder / "base")
    base = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    models: dict[str, torch.nn.Module] = {"": base}
    for name, config in _configs(row).items():
        adapter = PeftRow(name, lambda config=config: config, moved(0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models[name] = make_peft(adapter, copy.deepcopy(base), folder / name)
    models["mixlora"] = _save_mixlora(row, base, folder / "mixlora")
    if row.earlier_names:
        models["earlier-names"] = models["all-linear"]
        _rename(folder / "all-linear", folder / "earlier-names", row.earlier_names)
    classifier = classifier_of(base)
    models[_HEAD] = _save_classifier(row, classifier, folder / _HEAD)
    cases = [_Case(c.text, c.images, name) for name in models if name != _HEAD for c in _CASES]
    answers, logits = asyncio.run(_ask_all(path, folder, list(models), cases))
    return _Served(base, processor_of(path), models, answers, classifier, logits)


def classifier_of(base: PreTrainedModel) -> PreTrainedModel:
    """Return transformers' classifier around a copy of the layers of ``base``.

    Gemma 3 has a class of its own. Those of other layouts are the general one that it is made of.
    """
    config = copy.deepcopy(base.config)
    config.num_labels = 3
    family = type(base).__mro__[1]
    kinds = (GenericForSequenceClassification, family)
    kind: Any = type(f"{type(base).__name__}Classes", kinds, {})
    if config.model_type == "gemma3":
        kind = Gemma3ForSequenceClassification
    with torch.device("meta"):
        classifier = kind(config)
    classifier.model = copy.deepcopy(base.get_submodule("model"))
    torch.manual_seed(0)
    classifier.score = torch.nn.Linear(config.get_text_config().hidden_size, 3, bias=False)
    model: PreTrainedModel = classifier.eval()
    return model


def _save_classifier(row: VisionRow, classifier: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Save a LoRA on the language model and the tower, with the head that PEFT saves beside it."""
    trunk = rf".*\.{row.trunk}\..*\.(q_proj|v_proj|down_proj)|.*\.(fc1|qkv)"
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=trunk)
    adapter = PeftRow(_HEAD, lambda: config, moved(0.1))
    return make_peft(adapter, copy.deepcopy(classifier), folder)


class _TextModel:
    """A language model within a base, by the names of a base that has no tower."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.config, self._decoder = base.config.get_text_config(), base.get_decoder()

    def get_submodule(self, name: str) -> torch.nn.Module:
        module: torch.nn.Module = self._decoder.get_submodule(name.removeprefix("model."))
        return module


def _save_mixlora(row: VisionRow, base: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Save experts on the language model, and return the base with their published formula."""
    (own,) = (each for each in EXPERT_ROWS if each.id == "mixlora")
    adapter = own.build(cast(PreTrainedModel, _TextModel(base)), Random(row.id))
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(dict(adapter.config)))
    save_file(dict(adapter.tensors), folder / "adapter_model.safetensors")
    trunk = f"model.{row.trunk}."
    forwards = {
        name.replace("model.", trunk, 1): forward for name, forward in adapter.forwards.items()
    }
    return patched(base, forwards)


def _rename(source: Path, target: Path, names: Sequence[tuple[str, str]]) -> None:
    """Save an adapter with the tensors' names of transformers 4."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        renamed = key
        for now, earlier in names:
            renamed = renamed.replace(now, earlier)
        tensors[renamed] = tensor
    save_file(tensors, file)


async def _ask_all(
    base: Path, folder: Path, names: list[str], cases: list[_Case]
) -> tuple[dict[_Case, _Answer], dict[_Case, list[float]]]:
    """Ask all cases at once, so that adapters and images share steps and the prefix cache.

    Steps are short, so that most images are divided.
    """
    async with serving(base, folder / "state", max_step_tokens=40) as client:
        for name in filter(None, names):
            put = await put_upload(client, name, folder / name)
            assert put.status == 201, f"{name}: {put.message}"
        classified = asyncio.gather(*(_classify(client, case) for case in _CASES))
        first = await asyncio.gather(*(_ask(client, case) for case in cases))
        again = await asyncio.gather(*(_ask(client, case, echo=False) for case in cases))
        logits = dict(zip(_CASES, await classified, strict=True))
        for case in _CASES[1:2]:  # with the prefix cache, from the images that the tower has read
            assert await _classify(client, case) == pytest.approx(logits[case], abs=_TOLERANCE)
    for case, one, other in zip(cases, first, again, strict=True):
        assert one.token_ids == other.token_ids, f"{case} differs with cached prefixes"
        assert one.logprobs == pytest.approx(other.logprobs, abs=_TOLERANCE)
    return dict(zip(cases, first, strict=True)), logits


async def _classify(client: httpx.AsyncClient, case: _Case) -> list[float]:
    body = {"adapter": _HEAD, "messages": case.messages(), "use_activation": False}
    # a chat's prompt ends with the opening of the answer
    answer = await client.post("/classify", json={**body, "add_generation_prompt": True})
    assert answer.status_code == 200, answer.text
    (classes,) = answer.json()["data"]
    return list(classes["probs"])


async def _ask(client: httpx.AsyncClient, case: _Case, *, echo: bool = True) -> _Answer:
    body: dict[str, object] = {
        "messages": case.messages(),
        "max_tokens": _N_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "return_token_ids": True,
        # transformers would take a placeholder of the answer for one of an image
        "logit_bias": {str(IMAGE_ID): -100},
    }
    if echo:
        body["prompt_logprobs"] = 0
    if case.adapter:
        body["adapter"] = case.adapter
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    (choice,) = told["choices"]
    entries = told["prompt_logprobs"][1:] if echo else []
    return _Answer(
        choice["token_ids"],
        [entry["logprob"] for entry in choice["logprobs"]["content"]],
        told["prompt_token_ids"],
        [next(iter(entry.values()))["logprob"] for entry in entries],
    )


def _logprobs(served: _Served, model: torch.nn.Module, case: _Case, answer: _Answer) -> Any:
    """Return the oracle's prompt ids, and its log-probabilities [n − 1, vocab_size]."""
    prompt_ids, output = _forward(served, model, case, answer.token_ids)
    return prompt_ids, torch.log_softmax(output.logits[0, :-1].double(), dim=-1)


def _forward(
    served: _Served, model: torch.nn.Module, case: _Case, answer_ids: Sequence[int]
) -> tuple[list[int], Any]:
    """Return the oracle's prompt ids, and its output for the prompt and an answer."""
    parts = [{"type": "image"}] * len(case.images) + [{"type": "text", "text": case.text}]
    chat = [{"role": "user", "content": parts}]
    text = served.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    pictures = [case.pictures] if case.images else None
    inputs = served.processor(text=[text], images=pictures, return_tensors="pt")
    prompt_ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
        # PaliGemma's answer, of type 1, is causal behind a prompt of type 0
        of_answer = int(served.base.config.model_type == "paligemma")
        inputs[name] = pad(inputs[name], (0, len(answer_ids)), value=of_answer)
    ids = torch.cat([prompt_ids, torch.tensor([[*answer_ids]], dtype=torch.int64)], dim=1)
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
    return prompt_ids[0].tolist(), output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("vision")


@pytest.mark.parametrize(
    ("row", "adapter"),
    [
        pytest.param(
            *(row, name),
            id=f"{row.id}-{name or 'base'}",
            marks=[pytest.mark.nightly] if row.nightly else [],
        )
        for row in VISION_ROWS
        for name in (
            "",
            *_configs(row),
            "mixlora",
            *(["earlier-names"] if row.earlier_names else []),
        )
    ],
)
def test_chats_with_images_are_answered_as_transformers_and_peft_answer(
    row: VisionRow, adapter: str, folder: Path
) -> None:
    served = _served(row, folder / row.id)
    cases = [(case, answer) for case, answer in served.answers.items() if case.adapter == adapter]
    assert len(cases) == len(_CASES)
    for case, answer in cases:
        prompt_ids, expected = _logprobs(served, served.models[adapter], case, answer)
        assert list(answer.prompt_ids) == prompt_ids
        along = torch.tensor([*prompt_ids[1:], *answer.token_ids])
        found = torch.tensor([*answer.prompt_logprobs, *answer.logprobs], dtype=torch.float64)
        off = (expected.gather(1, along[:, None])[:, 0] - found).abs().max()
        assert off < _TOLERANCE, f"{case.text} {case.images}"
        n_before = len(prompt_ids) - 1
        best = expected[n_before:].index_fill(1, torch.tensor([IMAGE_ID]), -1e9).max(-1).values
        assert (best - found[n_before:]).abs().max() < _TOLERANCE
        if adapter:
            _, plain = _logprobs(served, served.base, case, answer)
            assert (plain - expected).abs().max() > _MATTERS


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.id, marks=[pytest.mark.nightly] if row.nightly else [])
        for row in VISION_ROWS
    ],
)
def test_classes_of_chats_with_images_are_those_of_the_saved_head(
    row: VisionRow, folder: Path
) -> None:
    served = _served(row, folder / row.id)
    tuned = served.models[_HEAD]
    for case, found in served.logits.items():
        expected = _forward(served, tuned, case, ())[1].logits[0]
        assert (expected - torch.tensor(found)).abs().max() < _TOLERANCE, f"{case.text}"
        plain = _forward(served, served.classifier, case, ())[1].logits[0]
        assert (expected - plain).abs().max() > _MATTERS
    one, other = (served.logits[case] for case in _CASES[1:3])
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > _MATTERS


def test_an_image_changes_the_answer(folder: Path) -> None:
    served = _served(VISION_ROWS[0], folder / VISION_ROWS[0].id)
    one, other = (served.answers[case] for case in _CASES[1:3])
    assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) > _MATTERS
