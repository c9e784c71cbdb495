"""One base behind two servers in this process: one computes alone, one with a second process."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import save_file

from tests.support.adapters.adapter_samples import SAMPLES, Sample
from tests.support.bases.tiny_models import tiny_llama
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.vectors.conftest import Server, serving

LIMITS: dict[str, Any] = {"max_loras": 24, "max_step_tokens": 64, "kv_memory_bytes": 128 << 10}
# Of families that are refused for one of their linears: the other, which is served.
HALVES = dict.fromkeys(("MOLA", "LORAMOE", "OFT", "BOFT"), "q_proj") | {"ROAD": "down_proj"}
PROMPT = [5, 9, 33, 7, 60, 12, 3, 18, 40, 11]


class Answer(NamedTuple):
    tokens: list[str]
    logprobs: list[float]


class Pair(NamedTuple):
    alone: Server
    split: Server


async def ask(server: Server, adapter: str | None, **fields: object) -> Answer:
    """Greedy tokens and their log-probabilities."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 0}
    answer = await server.post(
        "/v1/completions", **{**body, "adapter": adapter, "ignore_eos": True, **fields}
    )
    assert answer.status_code == 200, (adapter, answer.text)
    found = answer.json()["choices"][0]["logprobs"]
    return Answer(found["tokens"], found["token_logprobs"])


async def ask_all(server: Server, adapters: list[str | None], **fields: object) -> list[Answer]:
    """At once, so that they share steps."""
    return await asyncio.gather(*(ask(server, adapter, **fields) for adapter in adapters))


def check_same(found: Answer, expected: Answer, what: object = "") -> None:
    assert found.tokens == expected.tokens, what
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4), what


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a bias on every linear, those whose outputs are summed included."""
    folder = tmp_path_factory.mktemp("parallel") / "base"
    tiny_llama(bias=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of every family, by its name in small letters."""
    model, found = tiny_llama(bias=True), {}
    for family, make in SAMPLES.items():
        sample = make(model, tmp_path_factory.mktemp("drafts"), True)
        found[family.lower()] = write(sample, tmp_path_factory.mktemp(family.lower()))
        if leaf := HALVES.get(family):
            kept = {name: t for name, t in sample.tensors.items() if leaf in name}
            half = Sample({**sample.config, "target_modules": [leaf]}, kept)
            name = f"{family.lower()}_on_{leaf}"
            found[name] = write(half, tmp_path_factory.mktemp(name))
    return found


def write(sample: Sample, folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(sample.config))
    save_file(sample.tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="package")
async def pair(
    base: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[Pair]:
    states = [tmp_path_factory.mktemp("state") for _ in range(2)]
    async with (
        serving(base, states[0], **LIMITS) as alone,
        serving(base, states[1], tensor_parallel_size=2, **LIMITS) as split,
    ):
        yield Pair(alone, split)
