"""A tiny random base on disk, and the real server of it in this process."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex_server.engine.build import build_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.defaults import host_tier_bytes
from loraplex_server.launch import open_store
from loraplex_server.served_base import pooling_of_base, store_root
from loraplex_server.settings.config import HttpConfig, ServerConfig, StoreConfig
from loraplex_server.text.image_prompts import ImagePrompts
from tests.conformance.base_rows import BaseRow, base_config
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.built_app import built_app


def save_base(row: BaseRow, folder: Path, *, seed: int = 0) -> Path:
    """Weights as large as trained ones: attention, gates and rotations must all matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(row.model_type, **base_config(row))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@asynccontextmanager
async def serving(base: Path, state: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Raises ModelError if the server refuses to start. ``options``: of the engine's config."""
    with app_of(base, state, tiny_engine_config(**options)) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", timeout=120
        ) as client:
            yield client


def tiny_engine_config(**options: Any) -> EngineConfig:
    sizes = {"threads": 1, "kv_memory_bytes": 4 << 20, "adapter_memory_bytes": 4 << 20}
    return EngineConfig(**{"dtype": "float32", **sizes, **options})


@contextmanager
def app_of(
    base: Path, state: Path, engine: EngineConfig, http: HttpConfig | None = None
) -> Iterator[FastAPI]:
    """Yield the application of a base on disk. Raises ModelError if it cannot be served."""
    config = ServerConfig(
        http=http or HttpConfig(served_model_names=("base",)),
        engine=engine,
        store=StoreConfig(root=state, demos=False),
    )
    built = build_engine(config.engine, base)
    try:
        store = open_store(
            config,
            built.base_spec,
            store_root(config, built.base_spec),
            host_bytes=host_tier_bytes(built.device),
            packer=built.engine.packer,
        )
        try:
            yield built_app(
                built.engine,
                store,
                built.tokenizer,
                config,
                name=built.model_id,
                vocab_size=built.base_spec.vocab_size,
                tier=built.engine,
                experts=built.engine.experts,
                pooling=pooling_of_base(base),
                head=built.head,
                writes_text=built.writes_text,
                images=ImagePrompts.of(base),
                image_encoder=built.image_encoder,
            )
        finally:
            store.close()
    finally:
        built.engine.close()
