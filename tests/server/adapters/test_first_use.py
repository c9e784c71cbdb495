"""The first use of every part that is loaded lazily, from eight threads at once."""

from __future__ import annotations

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
from loraplex_generation.service import Generator
from loraplex_generation.shipped import shipped_folder
from loraplex_generation.task_vectors import TaskVectors
from loraplex_router.adapters import AdapterProfile
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest, GeneratedAdapters
from loraplex_server.adapters.semantic_router import SemanticRouter
from loraplex_server.adapters.sentence_encoder import SharedEncoder
from loraplex_server.api.errors import ApiError
from loraplex_server.api.serving.text_pipeline import TextPipeline
from loraplex_server.model.loader import Lazy
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.server_process import ServerProcess, server_process

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


def test_router_and_generator_share_the_encoder_whoever_is_first(
    encoder: SharedEncoder, pulled_base: Path
) -> None:
    """Half of the threads ask for a choice, half describe an adapter."""
    generator = Lazy(
        lambda: Generator.load(
            shipped_folder(), encoder.get(), base_name="base", base_directory=pulled_base
        )
    )
    profiles = [AdapterProfile("sql", "Writes SQL", ("Count the orders", "List the customers"))]
    router = SemanticRouter(encoder, lambda: profiles)

    def use(index: int) -> object:
        if index % 2:
            return asyncio.run(router.choose(f"Count the customers of day {index}")).candidates
        return generator.get().generate(WISHES[index % 4]).tensors

    assert all(at_once(use))
    router.close()
    assert torch.get_default_dtype() is torch.float32


def test_the_base_copy_of_icm_lora_is_loaded_once(pulled_base: Path) -> None:
    reader = TaskVectors.of_directory(pulled_base)
    first, *others = at_once(lambda _: reader.of("Sort the numbers"))
    for other in others:
        assert torch.equal(first, other)


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


def test_the_tokenizer_pipeline_renders_and_encodes_from_many_threads(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = TextPipeline(tokenizer)

    def encode(_: int) -> tuple[tuple[int, ...], str]:
        async def both() -> tuple[tuple[int, ...], str]:
            ids = await text.encode_chat(
                [{"role": "user", "content": "hi"}],
                template=None,
                add_generation_prompt=True,
                continue_final_message=False,
                template_arguments={},
            )
            return ids, await text.decode(ids, skip_special_tokens=False)

        return asyncio.run(both())

    assert len(set(at_once(encode))) == 1
    asyncio.run(text.close())


@pytest.fixture(scope="module")
def server(
    pulled_base: Path, pulled_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Just started: nothing has been asked for."""
    flags = ("--demos", "--kv-memory", "64MiB", "--adapter-memory", "64MiB")
    with server_process(pulled_base, tmp_path_factory.mktemp("state"), *flags) as server:
        yield server


@pytest.mark.slow
def test_a_server_survives_first_choices_and_first_descriptions_at_once(
    server: ServerProcess,
) -> None:
    """Eight of each, and the ICM-LoRA method, which loads a copy of the base, among them."""
    methods = ("auto", "sg-lora", "icm-lora")

    def ask(index: int) -> list[httpx.Response]:
        body = {"max_tokens": 1, "messages": [{"role": "user", "content": f"Sort 3, 1, {index}"}]}
        wanted = {"description": WISHES[index // 2], "method": methods[index % 3]}
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
