"""Every text encoder over HTTP, alone and under adapters of each kind, against PEFT.

All adapters, tasks and texts are asked at once, so that they share steps.
"""

import asyncio
import copy
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tests.conformance.encoders.encoder_rows import ENCODER_ROWS, EncoderAdapter, EncoderRow
from tests.conformance.load import put_upload
from tests.conformance.tiny_base import serving
from tests.support.bases.tiny_encoders import WORDS, save_tiny_encoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_TOLERANCE = 1e-4
_MATTERS = 0.02
_N_LABELS = 3
_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}
# Lengths differ, and the longest is longer than ModernBERT's window here.
_TEXTS = tuple(
    " ".join(random.Random(length).choices(WORDS, k=length)) for length in (1, 3, 3, 8, 21)
)


@pytest.mark.parametrize("row", ENCODER_ROWS, ids=lambda row: row.id)
def test_an_encoder_answers_as_peft_does_in_mixed_steps(row: EncoderRow, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = save_tiny_encoder(row.model_type, tmp_path / "base", **row.config)
    models = {each.id: _trained(each, base, tmp_path / each.id) for each in row.adapters()}
    answers = asyncio.run(_ask(base, tmp_path, row.adapters()))
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = _CLASSES["SEQ_CLS"].from_pretrained(base, dtype=torch.float32).eval()
    problems = _problems("", "SEQ_CLS", plain, None, tokenizer, answers[""])
    bare = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    embedded = _problems("", "FEATURE_EXTRACTION", bare, None, tokenizer, answers["base-vectors"])
    for adapter in row.adapters():
        model = models[adapter.id]
        with torch.no_grad(), model.disable_adapter():
            without = _expected(adapter.task, model, tokenizer, _TEXTS[-1])
        problems += _problems(
            adapter.id, adapter.task, model, without, tokenizer, answers[adapter.id]
        )
    assert problems + embedded == []


def _problems(
    name: str,
    task: str,
    model: nn.Module,
    without: Tensor | None,
    tokenizer: Any,
    answers: Sequence[Tensor],
) -> list[str]:
    problems = []
    for text, found in zip(_TEXTS, answers, strict=True):
        with torch.no_grad():
            expected = _expected(task, model, tokenizer, text)
        if found.shape != expected.shape:
            problems.append(f"{name}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        elif (off := float((found - expected).abs().max())) > _TOLERANCE:
            problems.append(f"{name}: {text[:20]!r} is off by {off:.1e}")
    if without is not None and float((without - answers[-1]).abs().max()) < _MATTERS:
        problems.append(f"{name}: the adapter changes nothing")
    return problems


def _expected(task: str, model: nn.Module, tokenizer: Any, text: str) -> Tensor:
    """Logits, or the normalised mean of hidden states."""
    output = model(**tokenizer(text, return_tensors="pt"))
    if task != "FEATURE_EXTRACTION":
        logits: Tensor = output.logits[0]
        return logits
    return nn.functional.normalize(output.last_hidden_state[0].mean(0), dim=0)


def _trained(adapter: EncoderAdapter, base: Path, folder: Path) -> peft.PeftModel:
    options: dict[str, Any] = {}
    if adapter.task != "FEATURE_EXTRACTION":
        options = {"num_labels": _N_LABELS, "ignore_mismatched_sizes": True}
    model = _CLASSES[adapter.task].from_pretrained(base, dtype=torch.float32, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, adapter.config())
        generator = torch.Generator().manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += adapter.std * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder)
    return tuned.eval()


async def _ask(
    base: Path, folder: Path, adapters: Sequence[EncoderAdapter]
) -> Mapping[str, list[Tensor]]:
    """Name of the adapter → its answer to each text."""
    tasks = {each.id: each.task for each in adapters}
    async with serving(base, folder / "state") as client:
        for name in tasks:
            put = await put_upload(client, name, folder / name)
            assert put.status == 201, f"{name}: {put.message}"
        asked = [("", "SEQ_CLS"), ("base-vectors", "FEATURE_EXTRACTION"), *tasks.items()]
        calls = [(name, task, text) for name, task in asked for text in _TEXTS]
        random.Random(3).shuffle(calls)
        given = await asyncio.gather(*(_answer(client, *call) for call in calls))
    found = {(name, text): answer for (name, _, text), answer in zip(calls, given, strict=True)}
    return {name: [found[name, text] for text in _TEXTS] for name, _ in asked}


async def _answer(client: httpx.AsyncClient, name: str, task: str, text: str) -> Tensor:
    path, key = {
        "SEQ_CLS": ("/classify", "probs"),
        "TOKEN_CLS": ("/pooling", "data"),
        "FEATURE_EXTRACTION": ("/v1/embeddings", "embedding"),
    }[task]
    body: dict[str, Any] = {"input": text}
    if task != "FEATURE_EXTRACTION":
        body["use_activation"] = False
    if name not in ("", "base-vectors"):
        body["adapter"] = name
    answer = await client.post(path, json=copy.copy(body))
    assert answer.status_code == 200, f"{name}: {answer.text}"
    return torch.tensor(answer.json()["data"][0][key])
