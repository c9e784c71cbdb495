"""Vectors and classes over HTTP are those of transformers, PEFT and sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from tests.vectors.conftest import Server

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::UserWarning")]

TEXTS = ["the quick brown fox", "hello", "a rather longer text than the others, to be sure 123"]
_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    return AutoModel.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def _hidden(model: Any, ids: list[int]) -> Tensor:
    hidden: Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return hidden


def _unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


def _near(found: object, expected: Tensor) -> None:
    assert torch.tensor(found).shape == expected.shape
    assert (torch.tensor(found) - expected).abs().max() < _TOLERANCE


async def test_embeddings_of_the_base_are_transformers_normalised_mean(
    server: Server, plain: Any, tokenizer: Any
) -> None:
    data = await server.data("/v1/embeddings", model="base", input=TEXTS)
    assert [item["index"] for item in data] == [0, 1, 2]
    for item, text in zip(data, TEXTS, strict=True):
        _near(item["embedding"], _unit(_hidden(plain, tokenizer(text)["input_ids"]).mean(0)))
