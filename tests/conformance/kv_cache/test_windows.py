"""A base whose layers all have a window, over HTTP: its pages are freed, and its answers exact."""

import asyncio
from pathlib import Path

import httpx
import torch

from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.judge import explain
from tests.conformance.load import Answer, Question, ask_all
from tests.conformance.oracle import load_base
from tests.conformance.tiny_base import save_base, serving

_PAGE_BYTES = 2 * 3 * 2 * 16 * 16 * 4  # of 16 tokens in float32
_N_PAGES = 12  # a prompt below needs 13 without its window


def _prompt(seed: int, n_tokens: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (n_tokens,), generator=generator).tolist())


_LONG = _prompt(0, 200)
_PROMPTS = (
    _LONG,
    _LONG[:150] + _prompt(1, 50),  # begins as another one
    *(_prompt(seed, 200) for seed in range(2, 6)),
    _prompt(6, 9),
)


def test_prompts_beyond_the_memory_are_answered_as_by_transformers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (row,) = (row for row in BASE_ROWS if row.id == "mistral-window")
    path = save_base(row, tmp_path / "base")
    questions = [Question(prompt) for prompt in _PROMPTS]

    async def ask() -> tuple[list[Answer], list[Answer], int]:
        options = {"kv_memory_bytes": _N_PAGES * _PAGE_BYTES, "max_step_tokens": 32}
        async with serving(path, tmp_path / "state", **options) as client:
            at_once = await ask_all(client, questions)
            # One prompt after the other: the pages at the end of the first are still cached.
            alone = [*await ask_all(client, questions[:1]), *await ask_all(client, questions[:1])]
            return at_once, alone, await _n_cached(client, _LONG)

    at_once, alone, n_cached = asyncio.run(ask())
    base = load_base(path)
    assert explain(base, None, questions, at_once) is None
    assert explain(base, None, [questions[0]] * 2, alone) is None
    assert n_cached == 192  # whole pages of all but the last token


async def _n_cached(client: httpx.AsyncClient, prompt: tuple[int, ...]) -> int:
    body = {"prompt": list(prompt), "max_tokens": 1}
    usage = (await client.post("/v1/completions", json=body)).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])
