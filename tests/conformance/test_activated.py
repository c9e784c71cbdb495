"""Activated LoRA over HTTP: exact against PEFT, and the conversation before it stays the base's."""

import asyncio
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from tests.conformance.base_rows import BaseRow
from tests.conformance.judge import explain
from tests.conformance.load import Put, Question, ask_all, put_upload
from tests.conformance.oracle import load_base, make_peft
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import save_base, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

_PAGE = 16
_JUDGE, _TITLE = (290, 291), (292,)  # invocation tokens, absent from all other text
_INVOCATIONS = {"judge": _JUDGE, "title": _TITLE, "lora": None}
_CHAT = tuple(torch.randint(3, 290, (70,), generator=torch.Generator().manual_seed(5)).tolist())
_TURNS: dict[str, tuple[int, ...]] = {
    "at the end": (*_CHAT, *_JUDGE),
    "before a turn": (*_CHAT, *_JUDGE, *_CHAT[:20]),
    "twice": (*_CHAT[:9], *_JUDGE, *_CHAT[9:], *_JUDGE, 7),
    "at the start": (*_JUDGE, *_CHAT),
    "in part": (*_CHAT, _JUDGE[0]),
    "nowhere": _CHAT,
    "of another": (*_CHAT, *_TITLE, 8),
}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_base(BaseRow("llama", "llama"), tmp_path_factory.mktemp("activated") / "base")


@pytest.fixture(scope="module")
def base(base_path: Path) -> PreTrainedModel:
    return load_base(base_path)


@pytest.fixture(scope="module")
def tuned(base: PreTrainedModel, base_path: Path) -> dict[str, nn.Module]:
    """Name of an adapter, saved beside the base → PEFT's model with it."""
    return {
        name: _tuned(base, base_path.parent / name, invocation)
        for name, invocation in _INVOCATIONS.items()
    }


def _tuned(
    base: PreTrainedModel, folder: Path, invocation: tuple[int, ...] | None, **options: Any
) -> nn.Module:
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    if invocation is not None:
        options["alora_invocation_tokens"] = list(invocation)
    row = PeftRow(folder.name, lambda: LoraConfig(r=4, **options), moved(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_peft(row, copy.deepcopy(base), folder)


async def _put_all(client: httpx.AsyncClient, folder: Path) -> None:
    for name in _INVOCATIONS:
        put = await put_upload(client, name, folder / name)
        assert put.status == 201, put.message


def test_rows_of_activated_adapters_share_steps_with_others_exactly(
    base: PreTrainedModel, base_path: Path, tuned: dict[str, nn.Module], tmp_path: Path
) -> None:
    cases = [(name, turn) for name in (None, *_INVOCATIONS) for turn in _TURNS]
    questions = [Question(_TURNS[turn], name, echo=turn != "twice") for name, turn in cases]

    async def ask() -> Any:
        async with serving(base_path, tmp_path) as client:
            await _put_all(client, base_path.parent)
            # asked again, when the pages of all of them are cached
            return await ask_all(client, questions), await ask_all(client, questions)

    problems = []
    for answers in asyncio.run(ask()):
        for (name, turn), question, answer in zip(cases, questions, answers, strict=True):
            model = base if name is None else tuned[name]
            problem = explain(model, None, [question], [answer])
            problems += [] if problem is None else [f"{name} {turn}: {problem}"]
    assert problems == []


def test_a_turn_of_an_activated_adapter_reuses_the_conversation_of_the_base(
    base_path: Path, tuned: dict[str, nn.Module], tmp_path: Path
) -> None:
    n_pages = len(_CHAT) // _PAGE

    async def ask() -> list[tuple[str, int]]:
        async with serving(base_path, tmp_path) as client:
            await _put_all(client, base_path.parent)
            found = []
            for name, prompt in (
                ("", _CHAT),
                ("judge", (*_CHAT, *_JUDGE)),
                ("title", (*_CHAT, *_TITLE)),
                ("lora", _CHAT),
                ("", (*_CHAT, *_JUDGE, *_CHAT)),  # the judge's pages are not the base's
                ("judge", (*_CHAT, *_JUDGE, *_CHAT)),
                ("judge", (*_CHAT, *_JUDGE, *_CHAT)),
            ):
                body = {"prompt": list(prompt), "max_tokens": 2, "temperature": 0}
                body |= {"adapter": name} if name else {}
                answer = (await client.post("/v1/completions", json=body)).json()
                found.append((name, answer["usage"]["prompt_tokens_details"]["cached_tokens"]))
            return found

    own = (2 * len(_CHAT) + len(_JUDGE) - 1) // _PAGE
    assert asyncio.run(ask()) == [
        ("", 0),
        ("judge", n_pages * _PAGE),
        ("title", n_pages * _PAGE),
        ("lora", 0),
        ("", n_pages * _PAGE),
        ("judge", n_pages * _PAGE),
        ("judge", own * _PAGE),
    ]


def test_what_would_act_before_the_invocation_is_refused_by_name(
    base: PreTrainedModel, base_path: Path, tmp_path: Path
) -> None:
    refused: dict[str, dict[str, Any]] = {
        "modules_to_save": {"modules_to_save": ["norm"]},
        "trained tokens": {"trainable_token_indices": [3]},
        "trained biases": {"bias": "lora_only"},
        "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    }
    for name, options in refused.items():
        _tuned(base, tmp_path / name, _JUDGE, **options)
    for name, tokens in (("ids below 300 is", [290, 300]), ("a list", "judge")):
        _tuned(base, tmp_path / name, _JUDGE)
        file = tmp_path / name / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "alora_invocation_tokens": tokens}))
        refused[name] = {}

    async def put() -> dict[str, Put]:
        async with serving(base_path, tmp_path / "state") as client:
            return {
                name: await put_upload(client, name.replace(" ", "-"), tmp_path / name)
                for name in refused
            }

    for name, answer in asyncio.run(put()).items():
        assert answer.status == 400
        assert "activated LoRA" in answer.message or "alora_invocation_tokens" in answer.message
        assert name in answer.message


def test_an_activated_adapter_is_no_part_of_a_mixture(
    base_path: Path, tuned: dict[str, nn.Module], tmp_path: Path
) -> None:
    async def ask() -> httpx.Response:
        async with serving(base_path, tmp_path) as client:
            await _put_all(client, base_path.parent)
            parts = [{"name": name, "weight": 0.5} for name in ("judge", "lora")]
            body = {"prompt": list(_CHAT), "max_tokens": 2, "adapter": parts}
            return await client.post("/v1/completions", json=body)

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert "'judge'" in answer.text
    assert "invocation" in answer.text
