"""Pages of the prefix cache in files, over HTTP: found after a restart, exact, and private."""

import asyncio
import stat
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.judge import explain
from tests.conformance.load import Answer, Question, ask_all, put_upload
from tests.conformance.oracle import load_base, make_peft
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import save_base, serving

_PAGE_BYTES = 2 * 3 * 2 * 16 * 16 * 4  # of 16 tokens in float32
_N_WHOLE = 192  # tokens of a prompt's whole pages, less the last token


def _prompt(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (200,), generator=generator).tolist())


_PROMPT = _prompt(0)


class _Bases:
    """Two bases of one shape, an adapter of the first, and transformers' and PEFT's models."""

    def __init__(self, folder: Path) -> None:
        (row,) = (row for row in BASE_ROWS if row.id == "llama")
        self.paths = [save_base(row, folder / str(seed), seed=seed) for seed in (0, 1)]
        self.models = [load_base(path) for path in self.paths]
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        lora = PeftRow("lora", lambda: config, moved(0.1))
        self.adapter = folder / "lora"
        self.tuned: nn.Module = make_peft(lora, load_base(self.paths[0]), self.adapter)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> _Bases:
    torch.set_num_threads(1)
    return _Bases(tmp_path_factory.mktemp("bases"))


async def _n_cached(client: httpx.AsyncClient, prompt: Sequence[int], **fields: str) -> int:
    body = {"prompt": list(prompt), "max_tokens": 1, **fields}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_prefixes_outlive_a_restart_for_their_base_adapter_and_tenant_alone(
    bases: _Bases, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    questions = [Question(_PROMPT), Question(_PROMPT, "lora")]

    async def ask(base: int) -> tuple[list[int], list[Answer]]:
        options = {"prefix_cache_dir": files}
        async with serving(bases.paths[base], tmp_path / f"state{base}", **options) as client:
            await put_upload(client, "lora", bases.adapter)
            n_cached = [
                await _n_cached(client, _PROMPT),
                await _n_cached(client, _PROMPT, adapter="lora"),
                await _n_cached(client, _PROMPT, cache_salt="theirs"),
            ]
            return n_cached, await ask_all(client, questions)

    n_first, _ = asyncio.run(ask(0))
    assert n_first == [0, 0, 0]
    stored = sorted(files.glob("*/*.kv"))
    assert len(stored) == 3 * _N_WHOLE // 16
    assert {stat.S_IMODE(path.stat().st_mode) for path in stored} == {0o600}
    n_again, answers = asyncio.run(ask(0))
    assert n_again == [_N_WHOLE] * 3
    assert explain(bases.models[0], None, questions[:1], answers[:1]) is None
    assert explain(bases.tuned, bases.models[0], questions[1:], answers[1:]) is None
    n_other, answers = asyncio.run(ask(1))
    assert n_other == [0, 0, 0]
    assert explain(bases.models[1], None, questions[:1], answers[:1]) is None


def test_a_damaged_file_is_computed_again(bases: _Bases, tmp_path: Path) -> None:
    files = tmp_path / "files"

    async def ask() -> tuple[int, list[Answer]]:
        options = {"prefix_cache_dir": files}
        async with serving(bases.paths[0], tmp_path / "state", **options) as client:
            n_cached = await _n_cached(client, _PROMPT)
            return n_cached, await ask_all(client, [Question(_PROMPT)])

    asyncio.run(ask())
    stored = sorted(files.glob("*/*.kv"), key=lambda path: path.stat().st_mtime_ns)
    for path in stored:
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    n_cached, answers = asyncio.run(ask())
    assert n_cached == 0
    assert explain(bases.models[0], None, [Question(_PROMPT)], answers) is None


def test_prefixes_come_back_after_others_took_their_pages(bases: _Bases, tmp_path: Path) -> None:
    prompts = [_prompt(seed) for seed in range(6)]  # the memory holds three

    async def ask() -> tuple[list[Answer], list[int]]:
        options = {"prefix_cache_dir": tmp_path / "files", "kv_memory_bytes": 42 * _PAGE_BYTES}
        async with serving(bases.paths[0], tmp_path / "state", **options) as client:
            answers = await ask_all(client, [Question(prompt) for prompt in prompts])
            answers += await ask_all(client, [Question(prompt) for prompt in prompts])
            metrics = (await client.get("/metrics")).text
            (line,) = (
                line
                for line in metrics.splitlines()
                if line.startswith("loraplex_prefix_cache_restored_total")
            )
            return answers, [int(float(line.split()[-1]))]

    answers, (n_restored,) = asyncio.run(ask())
    questions = [Question(prompt) for prompt in prompts] * 2
    assert explain(bases.models[0], None, questions, answers) is None
    assert n_restored >= _N_WHOLE


def test_a_folder_that_others_can_read_stops_the_start(bases: _Bases, tmp_path: Path) -> None:
    files = tmp_path / "files"

    async def start() -> None:
        async with serving(bases.paths[0], tmp_path / "state", prefix_cache_dir=files):
            pass

    asyncio.run(start())
    (own,) = files.iterdir()
    own.chmod(0o755)
    with pytest.raises(ValueError, match="other users may read"):
        asyncio.run(start())
