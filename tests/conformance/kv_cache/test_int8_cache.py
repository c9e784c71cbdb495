"""``--kv-cache-dtype int8`` over HTTP: the answers of transformers over rounded keys and values."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.judge import difference
from tests.conformance.load import Answer, Question, ask_all, put_upload
from tests.conformance.oracle import load_base, logprobs_along, make_peft
from tests.conformance.peft_row import PeftRow, drawn, moved
from tests.conformance.tiny_base import save_base, serving

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's prefix tuning

_HEAD_DIM = 16
_PAGE_BYTES = 2 * 3 * 2 * 16 * (_HEAD_DIM + 2)  # of 16 tokens: codes and scales
_FLOAT_PAGE_BYTES = 2 * 3 * 2 * 16 * _HEAD_DIM * 4
_KV_BYTES = 15 * _FLOAT_PAGE_BYTES  # one of the prompts below in float32, three in int8
_INVOCATION = (290, 291)
_TOLERANCE = 2e-3  # where a value is between two codes, one bit decides


def _prompt(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 290, (200,), generator=generator).tolist())


_CHAT = _prompt(0)
_REPEATED = (*_CHAT[:30] * 5, *_CHAT[:7])  # drafts are guessed from it
_QUESTIONS = (
    *(Question(prompt, echo=True) for prompt in (_CHAT, _REPEATED, _prompt(1), _prompt(2))),
    *(Question(prompt, "lora", echo=True) for prompt in (_CHAT, _REPEATED, _prompt(3))),
    Question((*_CHAT, *_INVOCATION), "judge"),
    Question(_CHAT[:60], "prefix"),
)


def _adapters() -> list[PeftRow]:
    task = {"task_type": "CAUSAL_LM"}
    invocation = list(_INVOCATION)
    return [
        PeftRow("lora", lambda: LoraConfig(r=4, target_modules="all-linear", **task), moved(0.1)),
        PeftRow(
            "judge",
            lambda: LoraConfig(
                r=4, target_modules="all-linear", alora_invocation_tokens=invocation, **task
            ),
            moved(0.1),
        ),
        PeftRow(
            "prefix",
            lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **task),
            drawn(0.2),
        ),
    ]


class _Models:
    """A base, and PEFT's models of its adapters."""

    def __init__(self, folder: Path) -> None:
        (row,) = (row for row in BASE_ROWS if row.id == "llama")
        self.path = save_base(row, folder / "base")
        self.models: dict[object, nn.Module] = {None: load_base(self.path)}
        self.folders = {row.id: folder / row.id for row in _adapters()}
        for adapter in _adapters():
            self.models[adapter.id] = make_peft(
                adapter, load_base(self.path), self.folders[adapter.id]
            )

    def differences(self, answers: Sequence[Answer]) -> list[float]:
        """Return how far each answer to ``_QUESTIONS`` is from transformers and PEFT."""
        found = []
        for question, answer in zip(_QUESTIONS, answers, strict=True):
            assert answer.status == 200, answer.error
            model = self.models[question.adapter]
            (rows,) = logprobs_along(model, [question.prompt], [answer.token_ids])
            found.append(difference(question, answer, rows))
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> _Models:
    torch.set_num_threads(1)
    return _Models(tmp_path_factory.mktemp("int8"))


def _rounded(update: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' ``update`` of a cache that gets 127 steps a side for each token."""

    def round_rows(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        near = step.bfloat16()
        above = near.nextafter(torch.full_like(near, torch.inf))
        step = torch.where(near.float() < step, above, near).float()
        return (x / step).round() * step

    def rounded(self: object, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Any:
        return update(self, round_rows(k), round_rows(v), *args, **kwargs)

    return rounded


async def _metric(client: httpx.AsyncClient, line: str) -> int:
    text = (await client.get("/metrics")).text
    (value,) = (row.split()[-1] for row in text.splitlines() if row.startswith(line))
    return int(float(value))


async def _n_cached(client: httpx.AsyncClient) -> int:
    body = {"prompt": list(_CHAT), "max_tokens": 1}
    usage = (await client.post("/v1/completions", json=body)).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_answers_are_those_of_transformers_over_rounded_keys_and_values(
    models: _Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kv_memory_bytes": _KV_BYTES, "prefix_cache_dir": tmp_path / "files"}

    async def ask(dtype: str) -> tuple[list[Answer], int, int]:
        state = tmp_path / "state"
        async with serving(models.path, state, kv_cache_dtype=dtype, **options) as client:
            for name, folder in models.folders.items():
                await put_upload(client, name, folder)
            n_cached = await _n_cached(client)
            n_pages = await _metric(client, 'loraplex_kv_pages{state="total"')
            answers = await ask_all(client, list(_QUESTIONS))
            await _n_cached(client)  # its pages are in memory at the end, and are written
            return answers, n_cached, n_pages

    first, n_first, n_pages = asyncio.run(ask("int8"))
    again, n_again, _ = asyncio.run(ask("int8"))  # a new server, which finds the files
    plain, n_plain, n_plain_pages = asyncio.run(ask("auto"))
    assert (n_first, n_again, n_plain) == (0, 192, 0)  # whole pages, of a cache of this dtype
    assert n_pages == _KV_BYTES // _PAGE_BYTES
    assert n_plain_pages == _KV_BYTES // _FLOAT_PAGE_BYTES
    exact = models.differences(plain)
    unrounded = models.differences(first)
    monkeypatch.setattr(DynamicLayer, "update", _rounded(DynamicLayer.update))
    for answers in (first, again):
        assert max(models.differences(answers)) < _TOLERANCE
    assert max(exact) < 1e-3
    assert min(unrounded) > 2 * _TOLERANCE  # so the oracle's rounding is seen
