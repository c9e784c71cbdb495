"""The first use of every part that is loaded lazily, from eight threads at once."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_router.adapters.auto_router import AdapterProfile
from loraplex_server.adapters.learning.generated_adapters import (
    GeneratedAdapters,
)
from loraplex_server.adapters.resolving.semantic_router import SemanticRouter
from loraplex_server.adapters.resolving.sentence_encoder import SharedEncoder
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.errors import ApiError
from loraplex_server.model.loading.loader import Lazy
from loraplex_server.text.text_pipeline import TextPipeline
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.servers.server_process import ServerProcess, server_process

_N = 8
WISHES = (
    "Write the figure out in Spanish",
    "Give the name in the order last, first",
    "Return the first entry of the list in capital letters",
    "Number to English text, and return a JSON object",
)
_T = TypeVar("_T")


def at_once(work: Callable[[int], _T]) -> list[_T]:
    """``work(i)`` on eight threads that start together."""
    barrier = threading.Barrier(_N)

    def run(index: int) -> _T:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(_N) as pool:
        return list(pool.map(run, range(_N)))


@pytest.fixture
def encoder(pulled_encoder: Path) -> SharedEncoder:
    """Not loaded yet."""
    return SharedEncoder(lambda: pulled_encoder)


def test_the_encoder_is_loaded_once_and_encodes_alike(encoder: SharedEncoder) -> None:
    encoders = at_once(lambda _: encoder.get())
    assert len({id(one) for one in encoders}) == 1
    quick, *others = at_once(lambda _: encoder.encode(["a cat"]))
    for other in others:
        torch.testing.assert_close(quick, other)
    assert torch.get_default_dtype() is torch.float32


def test_router_and_embeddings_share_the_encoder_whoever_is_first(encoder: SharedEncoder) -> None:
    """One thread asks for choices, the others encode."""
    profiles = [AdapterProfile("sql", "Writes SQL", ("Count the orders", "List the customers"))]
    pools = WorkerPools()
    router = SemanticRouter(encoder, lambda: profiles, pools.routing, pools.encoder)

    async def choose() -> bool:
        texts = [f"Count the customers of day {day}" for day in range(_N)]
        decisions = await asyncio.gather(*map(router.choose, texts))
        return all(decision.candidates for decision in decisions)

    def use(index: int) -> object:
        if index == 0:
            return asyncio.run(choose())
        return encoder.encode([WISHES[index % 4]]).numel() > 0

    assert all(at_once(use))
    pools.close()
    assert torch.get_default_dtype() is torch.float32


def test_a_generator_that_cannot_be_loaded_is_loaded_by_the_next_request(
    base_spec: BaseSpec, tmp_path: Path
) -> None:
    attempts: list[None] = []

    def load() -> ScriptedGenerator:
        attempts.append(None)
        if len(attempts) == 1:
            raise OSError("the disk is busy")
        return ScriptedGenerator(base_spec)

    with AdapterStore(tmp_path, base_spec) as store:
        adapters = GeneratedAdapters(store, Lazy(load).get)
        outcomes = at_once(lambda index: _outcome(adapters, f"task {index}"))
        adapters.close()
    assert sorted(outcomes) == ["generator_unavailable"] + ["made"] * (_N - 1)
    assert len(attempts) == 2


def _outcome(adapters: GeneratedAdapters, description: str) -> str:
    try:
        adapters.ensure(AdapterGenerationRequest(description))
    except ApiError as error:
        return error.code
    return "made"


def test_the_tokenizer_pipeline_renders_and_encodes_in_several_threads(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = TextPipeline(tokenizer)

    async def both(tenant: str) -> tuple[tuple[int, ...], str]:
        ids = await text.encode_chat(
            [{"role": "user", "content": "hi"}],
            template=None,
            add_generation_prompt=True,
            continue_final_message=False,
            template_arguments={},
            tenant=tenant,
        )
        return ids, await text.decode(ids, skip_special_tokens=False, tenant=tenant)

    async def use() -> None:
        assert len(set(await asyncio.gather(*[both(str(index)) for index in range(_N)]))) == 1
        await text.close()

    asyncio.run(use())


@pytest.fixture(scope="module")
def server(
    pulled_base: Path, pulled_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Just started: nothing has been asked for."""
    flags = ("--demos", "--kv-memory", "64MiB", "--adapter-memory", "64MiB")
    with server_process(pulled_base, tmp_path_factory.mktemp("state"), *flags) as server:
        yield server


@pytest.mark.slow
@pytest.mark.nightly
def test_a_server_survives_first_choices_and_first_descriptions_at_once(
    server: ServerProcess,
) -> None:
    """Eight of each."""

    def ask(index: int) -> list[httpx.Response]:
        body = {"max_tokens": 1, "messages": [{"role": "user", "content": f"Sort 3, 1, {index}"}]}
        wanted = {"description": WISHES[index // 2]}
        with httpx.Client(base_url=server.url, timeout=240) as client, ThreadPoolExecutor(2) as two:
            asked = [
                two.submit(client.post, "/v1/chat/completions", json={**body, "adapter": adapter})
                for adapter in ("auto", wanted)
            ]
            return [answer.result() for answer in asked]

    answers = [answer for pair in at_once(ask) for answer in pair]
    assert [answer.status_code for answer in answers] == [200] * (2 * _N), [
        answer.text for answer in answers if answer.status_code != 200
    ]
    assert "Traceback" not in server.log
    assert "Loading weights" not in server.log  # transformers' progress bar
