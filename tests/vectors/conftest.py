"""A real server of a tiny base in this process, and PEFT's adapters for it."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.resolving.sentence_encoder import EncoderModel
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.defaults import host_tier_bytes
from loraplex_server.engine.engine import Engine
from loraplex_server.launch import open_store
from loraplex_server.served_base import pooling_of_base, store_root
from loraplex_server.settings.config import HttpConfig, ServerConfig, StoreConfig
from tests.support.servers.built_app import built_app
from tests.support.servers.server_process import save_tiny_model

CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Trained:
    """A PEFT adapter on disk, and the model that it was saved from."""

    folder: Path
    model: PeftModel

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[n_labels], or [n_tokens, n_labels]."""
        logits: torch.Tensor = self.model(input_ids=torch.tensor([ids])).logits[0]
        return logits

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return hidden


@dataclass
class Server:
    client: httpx.AsyncClient
    engine: Engine
    app: FastAPI

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def data(self, path: str, **body: object) -> list[dict[str, Any]]:
        answer = await self.post(path, **body)
        assert answer.status_code == 200, answer.text
        data: list[dict[str, Any]] = answer.json()["data"]
        return data

    async def put(self, name: str, folder: Path, **options: object) -> dict[str, Any]:
        """Uploads every file of the folder."""
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja")
        }
        answer = await self.client.put(f"/v1/adapters/{name}", files=files, data=options)
        assert answer.status_code in (200, 201), answer.text
        card: dict[str, Any] = answer.json()
        return card


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("vectors") / "base")


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def train(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """An adapter of random weights, as PEFT saves it; equal arguments give the same one."""
    made: dict[str, Trained] = {}

    def make(
        task: str,
        *,
        n_labels: int = 3,
        seed: int = 0,
        files: dict[str, object] | None = None,
        **fields: object,
    ) -> Trained:
        key = json.dumps([task, n_labels, seed, files, fields], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(task.lower())
            made[key] = _train(base, folder, task, n_labels, seed, fields)
            for name, value in (files or {}).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(json.dumps(value))
        return made[key]

    return make


def _train(
    base: Path, folder: Path, task: str, n_labels: int, seed: int, fields: dict[str, object]
) -> Trained:
    torch.manual_seed(seed)
    options = {} if task == "FEATURE_EXTRACTION" else {"num_labels": n_labels}
    model: PreTrainedModel = CLASSES[task].from_pretrained(base, dtype=torch.float32, **options)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(**{"task_type": task, "r": 4, "target_modules": targets, **fields})
    peft = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            if "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter))
    peft.save_pretrained(folder)
    return Trained(folder, peft)


@asynccontextmanager
async def serving(
    base: Path,
    state: Path,
    *,
    encoder: EncoderModel | None = None,
    with_store: Callable[[AdapterStore], Mapping[str, Any]] = lambda store: {},
    **engine: Any,
) -> AsyncIterator[Server]:
    """``with_store`` makes parts of ``built_app`` that need the store."""
    defaults = {"kv_memory_bytes": 4 << 20, "adapter_memory_bytes": 8 << 20}
    config = ServerConfig(
        http=HttpConfig(served_model_names=("base",)),
        engine=EngineConfig(dtype="float32", threads=1, **{**defaults, **engine}),
        store=StoreConfig(root=state, demos=False),
    )
    built = build_engine(config.engine, base)
    try:
        with open_store(
            config,
            built.base_spec,
            store_root(config, built.base_spec),
            host_bytes=host_tier_bytes(built.device),
            packer=built.engine.packer,
        ) as store:
            app = built_app(
                built.engine,
                store,
                built.tokenizer,
                config,
                name=built.model_id,
                vocab_size=built.base_spec.vocab_size,
                tier=built.engine,
                encoder=encoder,
                pooling=pooling_of_base(base),
                head=built.head,
                writes_text=built.writes_text,
                image_encoder=built.image_encoder,
                **with_store(store),
            )
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", timeout=120
            ) as client:
                yield Server(client, built.engine, app)
    finally:
        built.engine.close()


@pytest.fixture(scope="package")
async def server(
    base: Path, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str
) -> AsyncIterator[Server]:
    """Yield a server that tests share; each uploads under names of its own."""
    async with serving(base, tmp_path_factory.mktemp("state")) as running:
        yield running
