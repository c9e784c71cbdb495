"""One server, an operator, and two tenants who must not notice each other."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.fine_tuning.answer_scores import AnswerScorer
from loraplex_server.adapters.fine_tuning.training import Training
from loraplex_server.adapters.learning.background_share import BackgroundShare
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.learning.jobs import Jobs
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.settings.api_keys import EVERY_ADAPTER, parse_keys
from loraplex_server.settings.config import HttpConfig
from loraplex_training.engine.engine import TrainingEngine
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from tests.server.conftest import Front, make_front
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.word_encoder import WordEncoder
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.servers.fake_engine import FakeEngine

KEYS = {
    "operator": 'scope = "admin"\noperator = true',
    "acme": 'scope = "admin"\ntenant = "acme"\nsources = ["*"]',
    "acme-reader": 'scope = "infer"\ntenant = "acme"',
    "umbra": 'scope = "admin"\ntenant = "umbra"\nsources = ["*"]',
    "prometheus": 'scope = "metrics"',
}


class House:
    """Requests in the name of a key."""

    def __init__(self, front: Front, sources: list[Path]) -> None:
        self.front = front
        self.sources = sources  # PEFT directories, each another adapter

    async def ask(
        self, key: str, method: str, path: str, body: object = None, **options: Any
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        return await self.front.client.request(method, path, headers=headers, json=body, **options)

    async def upload(
        self,
        key: str,
        name: str,
        number: int = 0,
        headers: Mapping[str, str] | None = None,
        template: str | None = None,
    ) -> httpx.Response:
        config, weights = (
            self.sources[number] / file
            for file in ("adapter_config.json", "adapter_model.safetensors")
        )
        files = {
            "config": ("adapter_config.json", config.read_bytes(), "application/json"),
            "weights": ("adapter_model.safetensors", weights.read_bytes()),
        }
        sent = {"authorization": f"Bearer {key}", **(headers or {})}
        data = {} if template is None else {"chat_template": template}
        path = f"/v1/adapters/{name}"
        return await self.front.client.put(path, headers=sent, files=files, data=data)

    async def upload_file(
        self, key: str, body: Mapping[str, object] = MappingProxyType({"prompt": "hi"})
    ) -> httpx.Response:
        """Upload a file of one completion."""
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {**body}}
        return await self.front.client.post(
            "/v1/files",
            files={"file": ("calls.jsonl", json.dumps(line))},
            data={"purpose": "batch"},
            headers={"authorization": f"Bearer {key}"},
        )

    async def job_ends(self, started: httpx.Response) -> None:
        """``started``: a 202."""
        jobs = self.front.app.state.parts.jobs
        assert await jobs.wait(jobs.get(started.json()["id"], EVERY_ADAPTER), 60)

    async def names(self, key: str) -> list[str]:
        listed = (await self.ask(key, "GET", "/v1/adapters")).json()["data"]
        return [card["name"] for card in listed]


def comparable(answer: httpx.Response) -> tuple[int, dict[str, str], str]:
    """Status, headers and body without what differs between any two equal requests."""
    changing = "created|id|expires|stage|progress|tokens_per_s"
    body = re.sub(rf'"({changing})":("[^"]*"|[0-9.]+)', "", answer.text)
    body = re.sub(r'("last_load_ms":\{"host":)[0-9.]+', r"\1…", body)
    headers = dict(answer.headers)
    for changing in (
        "x-request-id",
        "request-id",
        "content-length",
        "location",
        "openai-processing-ms",
    ):
        headers.pop(changing, None)
    return answer.status_code, headers, body


Build = Callable[..., House]


def _engine(rest: Callable[[], None]) -> TrainingEngine:
    model = tiny_model()
    weights = ModelWeights(model)
    return TrainingEngine(FrozenModel(model.config, weights, dtype=torch.float32, rest=rest))


def keys_file(quotas: dict[str, str]) -> str:
    return "\n".join(
        f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        f"{table}\n{quotas.get(name, '')}"
        for name, table in KEYS.items()
    )


@contextmanager
def open_house(
    tokenizer: PreTrainedTokenizerFast,
    spec: BaseSpec,
    folder: Path,
    quotas: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[House]:
    """``quotas``: further lines of a key."""
    folder.mkdir(exist_ok=True)
    http = HttpConfig(api_keys=parse_keys(keys_file(quotas or {})))
    with ExitStack() as closing:
        engine = FakeEngine(tokenizer.backend_tokenizer)

        def parts(store: AdapterStore) -> dict[str, object]:
            generated = GeneratedAdapters(store, lambda: ScriptedGenerator(spec), quota=2)
            choosers = Choosers(store, WordEncoder(), generated)
            closing.callback(generated.close)
            closing.callback(choosers.close)
            pools = WorkerPools()
            jobs = Jobs(pools.jobs)
            thread = TrainingThread(_engine, BackgroundShare(1.0, lambda: False), 1)
            closing.callback(thread.close)
            training = Training(
                store,
                jobs,
                thread,
                pools.jobs,
                tokenizer,
                AnswerScorer(engine, store, tokenizer, pools.jobs, base_name="tiny"),
                base_name="tiny",
                max_len=256,
                max_budget_s=0.001,  # so that each job fails at once
            )
            return {
                "generated": generated,
                **choosers.parts,
                "training": training,
                "jobs": jobs,
                "pools": pools,
            }

        front = make_front(
            tokenizer, spec, folder, http, with_store=parts, engine=engine, **options
        )
        closing.callback(front.close)
        sources = [write_lora(front.root / f"source-{n}", spec, seed=n) for n in range(3)]
        yield House(front, sources)


@pytest.fixture
def house(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[House]:
    with open_house(tokenizer, base_spec, tmp_path, n_kept_revisions=1) as house:
        yield house


@pytest.fixture
def house_with(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Build]:
    with ExitStack() as closing:

        def build(**quotas: str) -> House:
            return closing.enter_context(open_house(tokenizer, base_spec, tmp_path, quotas))

        yield build
