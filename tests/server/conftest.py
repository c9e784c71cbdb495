"""The whole front over a scripted engine and a real store of a tiny base."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.contents.packed_files import Packer
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.sources.prefix import SourcePrefix
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_server.health_tracker import HealthTracker
from loraplex_server.settings.config import HttpConfig, ServerConfig, StoreConfig
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.asgi_call import AsgiCall, events_of
from tests.support.servers.built_app import built_app
from tests.support.servers.fake_engine import FakeEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base_spec() -> BaseSpec:
    return BaseSpec.of(tiny_model(), "tiny/llama")


@dataclass
class Front:
    """A running front: send it requests, look at what the engine got."""

    app: FastAPI
    engine: FakeEngine
    store: AdapterStore
    client: httpx.AsyncClient
    root: Path  # the directory that clients may load adapters from
    headers: dict[str, str] = field(default_factory=dict)

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers={**self.headers, **headers})

    async def chat(self, **fields: object) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.post("/v1/chat/completions", body)

    async def complete(self, **fields: object) -> httpx.Response:
        return await self.post("/v1/completions", {"model": "base", "prompt": "hi", **fields})

    async def chat_events(self, **fields: object) -> list[Any]:
        answer = await self.chat(stream=True, **fields)
        assert answer.status_code == 200, answer.text
        return events_of(answer.content)

    async def completion_events(self, **fields: object) -> list[Any]:
        answer = await self.complete(stream=True, **fields)
        assert answer.status_code == 200, answer.text
        return events_of(answer.content)

    def close(self) -> None:
        logging.getLogger().removeHandler(self.app.state.parts.health_tracker)
        with ThreadPoolExecutor(1) as thread:  # a test may close from its event loop
            thread.submit(lambda: asyncio.run(self.close_workers())).result()
        self.store.close()

    async def close_workers(self) -> None:
        parts = self.app.state.parts
        await parts.text.close()
        await parts.file_checks.close()

    def call(self, path: str, body: object, *, spec_version: str = "2.3") -> AsgiCall:
        return AsgiCall(self.app, "POST", path, body=body, spec_version=spec_version)


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of every route, as the schema lists them: ``{name}`` for a parameter."""
    paths = app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def make_front(
    tokenizer: PreTrainedTokenizerFast,
    spec: BaseSpec,
    folder: Path,
    http: HttpConfig | None = None,
    *,
    allow_sources: Sequence[str] = (),
    with_store: Callable[[AdapterStore], Mapping[str, Any]] = lambda store: {},
    n_kept_revisions: int = 0,
    limits: StoreLimits = StoreLimits(),  # noqa: B008  frozen value
    packer: Packer | None = None,
    host_bytes: int = 2 << 30,
    engine: Any = None,
    catalogue: Catalogue | None = None,
    **parts: Any,
) -> Front:
    """``parts`` of ``built_app``; ``with_store`` makes those that need the store.

    ``engine``: a real one in place of the scripted one. A ``catalogue`` is asked each time.
    """
    health_tracker = HealthTracker()
    logging.getLogger().addHandler(health_tracker)
    http = http or HttpConfig(served_model_names=("base",))
    root = folder / "adapters"
    root.mkdir(exist_ok=True)
    store = AdapterStore(
        folder / "store",
        spec,
        limits=limits,
        allowed_roots=[root],
        engine=EngineHooks(packer),
        host_bytes=host_bytes,
        n_kept_revisions=n_kept_revisions,
        catalogue=catalogue,
        catalogue_limits=CatalogueLimits(refresh_s=0.0, poll_s=3600.0),
    )
    engine = engine or FakeEngine(tokenizer.backend_tokenizer)
    if not http.served_model_names:
        http = http.model_copy(update={"served_model_names": ("base",)})
    allowed = tuple(SourcePrefix.parse(text) for text in allow_sources)
    config = ServerConfig(http=http, store=StoreConfig(allow_sources=allowed))
    parts = {"name": "tiny/llama", **parts, **with_store(store)}
    parts["health_tracker"] = health_tracker
    app = built_app(engine, store, tokenizer, config, **parts)
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
    return Front(app, engine, store, client, root)


@pytest.fixture
def front(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    front = make_front(tokenizer, base_spec, tmp_path)
    yield front
    front.close()


@pytest.fixture
def lora(front: Front, base_spec: BaseSpec) -> Front:
    """A front that knows the adapters ``pirate`` and ``org/poet``."""
    for seed, name in enumerate(("pirate", "org/poet")):
        source = write_lora(front.root / name.replace("/", "-"), base_spec, seed=seed)
        front.store.put_directory(name, source)
    return front


@pytest.fixture(scope="session")
def fuzz_front(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Front]:
    """One front for many generated requests."""
    front = make_front(tokenizer, base_spec, tmp_path_factory.mktemp("fuzz"))
    yield front
    front.close()
