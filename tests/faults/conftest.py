"""A real engine, a real store and the whole HTTP side, whose parts are made to fail one by one."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.resolving.sentence_encoder import SharedEncoder
from loraplex_server.api.state import AppState
from loraplex_server.engine.engine import Engine
from loraplex_server.health_tracker import HealthTracker
from loraplex_server.settings.config import HttpConfig, ServerConfig
from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.servers.built_app import built_app
from tests.support.servers.engines import running_engine

FAMILIES = ("LORA", "MOLA", "OFT", "PREFIX_TUNING")  # factors, experts, an operator, KV pages
_DESCRIPTIONS = {"LORA": "Talks like a pirate", "OFT": "Writes SQL queries"}
_CANARY = "canary"
_PATHS = re.compile(r"/(tmp|home|root|work|usr|dev)\b|\.py\b")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class World:
    """Ask it over HTTP; look whether anything is held that should not be."""

    engine: Engine
    store: AdapterStore
    health_tracker: HealthTracker
    client: httpx.AsyncClient
    folder: Path
    generator: ScriptedGenerator
    encoder: SharedEncoder
    parts: AppState
    expected: dict[str, Any] = field(default_factory=dict)  # adapter → its answer without faults

    async def ask(self, adapter: object, **fields: object) -> httpx.Response:
        body = {
            "model": "base",
            "adapter": adapter,
            "prompt": "hello there",
            "max_tokens": 6,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
            **fields,
        }
        return await self.client.post("/v1/completions", json=body)

    async def learn(self, adapter: str) -> None:
        answer = await self.ask(adapter)
        assert answer.status_code == 200, answer.text
        self.expected[adapter] = answer.json()["choices"]

    async def check_right(self, adapter: str) -> None:
        """It answers as it did before the faults, bit by bit."""
        answer = await self.ask(adapter)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == self.expected[adapter]

    @asynccontextmanager
    async def canary(self) -> AsyncIterator[None]:
        """Another adapter's long answers all through the block: each the same, bit by bit."""
        if not self.expected.get(_CANARY):
            self.expected[_CANARY] = await self._canary_answer()
        done = asyncio.Event()

        async def sing() -> int:
            n_answers = 0
            while not (done.is_set() and n_answers):
                assert await self._canary_answer() == self.expected[_CANARY]
                n_answers += 1
            return n_answers

        singing = asyncio.create_task(sing())
        try:
            yield
        finally:
            done.set()
            await singing

    @asynccontextmanager
    async def canary_that_runs(self) -> AsyncIterator[None]:
        """Run an answer of another adapter from before the block on."""
        self.expected.setdefault(_CANARY, await self._canary_answer())
        singing = asyncio.create_task(self._canary_answer())
        while not self.engine.stats().n_running:
            if singing.done():  # between two looks
                assert singing.result() == self.expected[_CANARY]
                singing = asyncio.create_task(self._canary_answer())
            await self.engine.unload("nothing")
        yield
        assert await singing == self.expected[_CANARY]

    async def _canary_answer(self) -> object:
        answer = await self.ask(_CANARY, max_tokens=40)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    async def check_idle(self) -> None:
        """Check that idle parts hold no lease, no KV page and no device slot."""
        await self.engine.unload("nothing")  # the engine has read all that was sent before
        loop = self.engine.loop
        assert self.store.stats().n_leases == 0
        assert loop.kv_cache.n_pages_held == 0
        residents = loop.adapters.residents
        pool = loop.adapters.pool
        assert set(pool.slots) == {slot for one in residents for slot in one.memory.slots}
        assert pool.bytes_used == sum(one.n_bytes for one in residents)

    async def check_no_requests(self) -> None:
        """Wait until cancelled requests have ended."""
        while self.engine._inbox.n_requests:
            await self.engine.unload("nothing")

    async def forget(self, adapter: str) -> None:
        """Off the device and out of host memory: the next request loads it from disk."""
        digest = self.store.get(adapter).digest
        await self.engine.unload(digest)
        self.store.state.tier.drop(digest)

    async def health(self) -> dict[str, Any]:
        answer = await self.client.get("/health")
        assert answer.status_code == 200
        told: dict[str, Any] = answer.json()
        return told

    async def listing(self) -> dict[str, str]:
        """Name → digest, as clients see it."""
        data = (await self.client.get("/v1/adapters")).json()["data"]
        return {card["name"]: card["digest"] for card in data}

    async def upload(self, name: str, folder: Path) -> httpx.Response:
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        return await self.client.put(f"/v1/adapters/{name}", files=files)

    def check_files(self) -> None:
        """No content on disk that no name reaches, and nothing staged."""
        self.store.garbage.finish()
        named = {card.digest for card in self.store.list()}
        assert set(self.store.state.files.digests()) == named
        assert set(self.store.state.packed.digests()) <= named
        assert not any((self.folder / "store" / "staging").iterdir())

    async def count(self, part: str) -> float:
        text = (await self.client.get("/metrics")).text
        line = next(x for x in text.splitlines() if f'loraplex_faults_total{{part="{part}"}}' in x)
        return float(line.rpartition(" ")[2])


def check_fault(answer: httpx.Response, *codes: str) -> None:
    """A 500 or 503 that names what failed and what to do, and no path."""
    assert answer.status_code in (500, 503), answer.text
    error = answer.json()["error"]
    assert error["code"] in codes, answer.text
    assert "try again" in error["message"] or "tries again" in error["message"], answer.text
    assert not _PATHS.search(answer.text), answer.text
    assert "secret" not in answer.text
    if answer.status_code == 503:
        assert int(answer.headers["retry-after"]) >= 1


@pytest.fixture(scope="package")
def base_spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(eos_token_id=2), "tiny/llama")


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    with running_engine(tiny_model(eos_token_id=2)) as engine:
        yield engine


@pytest.fixture(scope="package")
def encoder(pulled_encoder: Path) -> SharedEncoder:
    return SharedEncoder(lambda: pulled_encoder)


@pytest.fixture(scope="package")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with an adapter of each family."""
    model, found = tiny_model(eos_token_id=2), {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        sample = SAMPLES[family](model, tmp_path_factory.mktemp("drafts"), True)
        (folder / "adapter_config.json").write_text(json.dumps(sample.config))
        save_file(sample.tensors, folder / "adapter_model.safetensors")
        found[family] = folder
    return found


@pytest.fixture
def open_world(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    encoder: SharedEncoder,
    samples: dict[str, Path],
    tmp_path: Path,
) -> Callable[[Engine], AbstractContextManager[World]]:
    """The HTTP side of an engine."""
    return partial(_open_world, tokenizer, base_spec, encoder, samples, tmp_path)


@pytest.fixture
def world(
    engine: Engine,
    open_world: Callable[[Engine], AbstractContextManager[World]],
) -> Iterator[World]:
    with open_world(engine) as world:
        yield world


@contextmanager
def _open_world(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    encoder: SharedEncoder,
    samples: dict[str, Path],
    tmp_path: Path,
    engine: Engine,
) -> Iterator[World]:
    health_tracker = HealthTracker()
    store = AdapterStore(
        tmp_path / "store",
        base_spec,
        engine=EngineHooks(engine.packer),
        allowed_roots=[tmp_path],
    )
    store.put_directory(_CANARY, write_lora(tmp_path / "canary", base_spec, seed=7, scale=0.5))
    for family, folder in samples.items():
        options = PutOptions(description=_DESCRIPTIONS.get(family))
        store.put_directory(family.lower(), folder, options=options)
    generator = ScriptedGenerator(base_spec)
    generated = GeneratedAdapters(store, lambda: generator)
    choosers = Choosers(store, encoder, generated)
    app = built_app(
        engine,
        store,
        tokenizer,
        ServerConfig(http=HttpConfig(served_model_names=("base",))),
        tier=engine,
        generated=generated,
        **choosers.parts,
        health_tracker=health_tracker,
    )
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False),
        base_url="http://127.0.0.1:8000",
        timeout=60,
    )
    parts = app.state.parts
    with health_tracker.listening():
        yield World(engine, store, health_tracker, client, tmp_path, generator, encoder, parts)
    choosers.close()
    generated.close()
    asyncio.run(parts.text.close())
    parts.pools.close()
    store.close()
