"""What calls for vectors share with all others: limits, keys, counters, errors, and ``auto``."""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.errors import unavailable
from loraplex_server.settings.api_keys import AdapterAccess, ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.word_encoder import WordEncoder

pytestmark = pytest.mark.anyio

_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": "hi"}),
    ("/pooling", {"input": "hi"}),
    ("/score", {"text_1": "hi", "text_2": "ho"}),
    ("/rerank", {"query": "hi", "documents": ["ho"]}),
]
_SECRET = "pirates-only"


def write_classifier(folder: Path, spec: BaseSpec, *, seed: int = 0, n_labels: int = 2) -> Path:
    write_lora(folder, spec, seed=seed)
    weights = load_file(folder / "adapter_model.safetensors")
    score = torch.randn(n_labels, spec.hidden_size, generator=torch.Generator().manual_seed(seed))
    save_file(
        {**weights, "base_model.model.score.weight": score}, folder / "adapter_model.safetensors"
    )
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
    return folder


@pytest.fixture
def judged(lora: Front, base_spec: BaseSpec) -> Front:
    lora.store.put_directory("judge", write_classifier(lora.root / "judge", base_spec))
    return lora


async def _error(front: Front, path: str, **body: object) -> tuple[int, str, str | None]:
    answer = await front.post(path, body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/embeddings", {}, "invalid_value", "input"),
        ("/v1/embeddings", {"input": "a", "messages": [{"role": "user"}]}, None, "input"),
        ("/v1/embeddings", {"input": ""}, "invalid_value", "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "invalid_value", "input"),
        ("/v1/embeddings", {"input": [1, 10**6]}, "invalid_value", "input"),
        ("/v1/embeddings", {"input": [1] * 300}, "context_length_exceeded", "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 65}, "invalid_value", "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        (
            "/v1/embeddings",
            {"input": "a", "normalize": False},
            "unsupported_parameter",
            "normalize",
        ),
        ("/v1/embeddings", {"input": "a", "encoding_format": "bytes"}, None, "encoding_format"),
        (
            "/v1/embeddings",
            {"input": "a", "truncate_prompt_tokens": 257},
            "invalid_value",
            "truncate_prompt_tokens",
        ),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, None, "input"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "invalid_value", "input"),
        ("/pooling", {"input": "a", "task": "rank"}, "invalid_value", "task"),
        ("/pooling", {"input": "a", "model": "judge", "dimensions": 1}, None, "dimensions"),
        ("/classify", {"input": "a"}, "adapter_has_no_head", "model"),
        ("/classify", {"input": "a", "adapter": "pirate"}, "adapter_has_no_head", "adapter"),
        ("/classify", {"input": "a", "adapter": "auto"}, "invalid_value", "adapter"),
        ("/score", {"text_1": "a"}, "invalid_value", "text_1"),
        ("/score", {"text_1": "a", "text_2": "b", "items": "c"}, "invalid_value", "text_1"),
        ("/score", {"queries": ["a", "b"], "items": "c"}, "invalid_value", "queries"),
        (
            "/score",
            {"text_1": "a", "text_2": "b", "model": "judge"},
            "adapter_has_no_head",
            "model",
        ),
        ("/rerank", {"query": "a", "documents": []}, "invalid_value", "documents"),
        ("/rerank", {"query": "a", "documents": ["b"] * 2050}, "invalid_value", "documents"),
    ],
)
async def test_wrong_requests_are_told_what_is_wrong(
    path: str, body: dict[str, Any], code: str | None, param: str, judged: Front
) -> None:
    status, found, named = await _error(judged, path, **body)
    assert (status, named) == (400, param)
    assert found == (code or "invalid_value")
    assert judged.engine.requests == []
    assert all(card.n_leases == 0 for card in judged.store.list())


@pytest.mark.parametrize(("path", "body"), _CALLS)
async def test_an_unknown_model_is_a_404(path: str, body: dict[str, Any], lora: Front) -> None:
    assert await _error(lora, path, **body, model="nobody") == (404, "model_not_found", "model")


async def test_a_text_may_fill_the_context(front: Front) -> None:
    ids = [1] * 255  # the scripted engine has 256 and leaves one
    assert (await front.post("/v1/embeddings", {"input": ids})).status_code == 200


@pytest.mark.parametrize("refuses_later", [False, True])
async def test_a_large_call_leaves_room_in_the_queue(front: Front, refuses_later: bool) -> None:
    """The queue holds eight: a call of twenty waits for its own requests, and all are answered."""
    front.engine.manual, front.engine.refuses_later = False, refuses_later
    texts = [f"text {number}" for number in range(20)]
    answer = await front.post("/v1/embeddings", {"input": texts})
    assert answer.status_code == 200
    assert [item["index"] for item in answer.json()["data"]] == list(range(20))
    assert len(front.engine.requests) == 20
    prompts = [request.prompt_ids for request in front.engine.requests]
    single = await front.post("/v1/embeddings", {"input": texts[7]})
    assert prompts[7] == front.engine.requests[-1].prompt_ids
    assert single.json()["data"][0]["embedding"] == answer.json()["data"][7]["embedding"]


@pytest.mark.parametrize("refuses_later", [False, True])
async def test_a_full_queue_is_a_429(front: Front, refuses_later: bool) -> None:
    front.engine.max_queue, front.engine.refuses_later = 0, refuses_later
    answer = await front.post("/v1/embeddings", {"input": ["x", "y"]})
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "queue_full"
    assert "retry-after" in answer.headers


async def test_a_server_that_goes_down_answers_all(front: Front) -> None:
    front.engine.manual = True
    asked = asyncio.create_task(front.post("/v1/embeddings", {"input": ["a", "b"]}))
    await front.engine.arrival(2)
    for call in list(front.app.state.parts.live):
        call.fail(unavailable("the server went down", "server_draining"))
    answer = await asked
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "server_draining"
    assert len(front.engine.cancelled) == 2


async def test_a_client_that_leaves_cancels_and_releases(lora: Front) -> None:
    lora.engine.manual = True
    body = {"input": ["a", "b", "c"], "model": "pirate"}
    async with lora.call("/v1/embeddings", body):
        await lora.engine.arrival(3)
        assert lora.store.get("pirate").n_leases == 1
    assert len(lora.engine.cancelled) == 3
    await asyncio.sleep(0)  # the last events are delivered
    assert lora.store.get("pirate").n_leases == 0
    assert "loraplex" in (await lora.client.get("/metrics")).text


async def test_tokens_are_counted_and_labelled(lora: Front) -> None:
    answer = await lora.post("/v1/embeddings", {"input": ["one two", "three"], "model": "pirate"})
    n_tokens = answer.json()["usage"]["prompt_tokens"]
    assert answer.headers["x-loraplex-adapter"].startswith("pirate@")
    metrics = (await lora.client.get("/metrics")).text
    counted = re.search(r"^vllm:prompt_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert counted is not None
    assert float(counted[1]) == n_tokens
    assert f'loraplex_adapter_prompt_tokens_total{{adapter="pirate"}} {float(n_tokens)}' in metrics
    assert 'handler="/v1/embeddings"' in metrics


@pytest.fixture
def keyed(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    key = ApiKey.of(_SECRET, Scope.INFER)
    key = replace(key, tokens_per_minute=10, access=AdapterAccess(("pirate",)))
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(api_keys=(key,)))
    for seed, name in enumerate(("pirate", "poet")):
        front.store.put_directory(name, write_lora(front.root / name, base_spec, seed=seed))
    yield front
    front.store.close()


@pytest.mark.parametrize(("path", "body"), _CALLS)
async def test_keys_hold_for_every_route(path: str, body: dict[str, Any], keyed: Front) -> None:
    assert (await keyed.post(path, body)).status_code == 401
    keyed.headers = {"authorization": f"Bearer {_SECRET}"}
    assert await _error(keyed, path, **body, model="poet") == (403, "adapter_not_allowed", "model")
    assert (await keyed.post(path, {**body, "model": "pirate"})).status_code == 200


async def test_tokens_of_texts_are_paid_for(keyed: Front) -> None:
    keyed.headers = {"authorization": f"Bearer {_SECRET}"}
    status, code, _ = await _error(keyed, "/v1/embeddings", input=[1] * 20)
    assert (status, code) == (400, "tokens_above_limit")
    assert (await keyed.post("/v1/embeddings", {"input": [1] * 10})).status_code == 200
    status, code, _ = await _error(keyed, "/v1/embeddings", input="x")
    assert (status, code) == (429, "rate_limit_exceeded")


async def test_auto_chooses_for_vectors_but_never_a_classifier(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    opened: list[Choosers] = []

    def parts(store: AdapterStore) -> dict[str, object]:
        opened.append(Choosers(store, WordEncoder()))
        return opened[0].parts

    front = make_front(tokenizer, base_spec, tmp_path, with_store=parts)
    try:
        told = {
            "rum": ["rum ship parrot", "rum parrot", "where is the ship rum"],
            "sql": ["select table rows", "table join", "count rows table"],
        }
        for seed, (name, examples) in enumerate(told.items()):
            source = write_lora(front.root / name, base_spec, seed=seed)
            options = PutOptions(description=examples[0], examples=tuple(examples))
            front.store.put_directory(name, source, options=options)
        ask = {"input": "rum ship parrot", "adapter": "auto"}
        chosen = await front.post("/v1/embeddings", ask)
        assert chosen.json()["adapter"]["name"] == "rum"
        # the same name now classifies: it is no candidate any more, for nobody
        classifier = write_classifier(front.root / "new", base_spec)
        options = PutOptions(description=told["rum"][0], examples=tuple(told["rum"]))
        front.store.put_directory("rum", classifier, options=options)
        opened[0].router._listed_at = float("-inf")
        for path, body in (
            ("/v1/embeddings", ask),
            ("/v1/completions", {"prompt": "rum ship parrot", "adapter": "auto"}),
        ):
            answer = await front.post(path, body)
            assert answer.status_code == 200, answer.text
            candidates = answer.json()["adapter"]["chosen_by"]["candidates"]
            assert [one["name"] for one in candidates] == ["sql"]
    finally:
        opened[0].close()
        front.store.close()
