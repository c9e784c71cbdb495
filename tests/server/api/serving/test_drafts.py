"""Drafts through a real server: transformers judges greedy answers, and answers without drafts all.

The base is random, so a greedy answer soon repeats itself and gives drafts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

PROMPT = [5, 9, 200, 31, 7, 40, 5, 9, 200, 31]
SCHEMA = {
    "type": "object",
    "properties": {
        "numbers": {"type": "array", "items": {"type": "boolean"}, "minItems": 5, "maxItems": 9},
        "kind": {"enum": ["a long kind of thing", "another"]},
    },
    "required": ["numbers", "kind"],
    "additionalProperties": False,
}
_INVOCATION = PROMPT[-2:]  # of the activated adapter


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("drafts")
    model = save_tiny_model(folder / "model", context=512)
    with server_process(model, folder / "state") as process:
        yield process


@pytest.fixture(scope="module")
def base(server: ServerProcess) -> PreTrainedModel:
    return tiny_model(eos_token_id=2, max_position_embeddings=512)


@pytest.fixture(scope="module")
def client(
    server: ServerProcess, base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("adapters")
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for name in ("LORA", "MIXLORA"):
            put(client, name.lower(), *SAMPLES[name](base, folder / name, True), folder)
        sample = SAMPLES["LORA"](base, folder / "alora", True)
        config = {**sample.config, "alora_invocation_tokens": _INVOCATION}
        put(client, "alora", config, sample.tensors, folder)
        yield client


def put(
    client: httpx.Client,
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
) -> None:
    path = folder / f"{name}.safetensors"
    save_file(dict(tensors), path)
    files = {
        "config": ("adapter_config.json", json.dumps(config, default=sorted).encode()),
        "weights": ("adapter_model.safetensors", path.read_bytes()),
    }
    answer = client.put(f"/v1/adapters/{name}", files=files)
    assert answer.status_code == 201, answer.text


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 80, "temperature": 0, "return_token_ids": True}
    answer = client.post("/v1/completions", json={**body, "ignore_eos": True, **fields})
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def n_accepted(answer: Mapping[str, Any]) -> int:
    details = answer["usage"].get("completion_tokens_details", {})
    return int(details.get("accepted_prediction_tokens", 0))


def without_details(answer: Mapping[str, Any]) -> dict[str, Any]:
    details = {"completion_tokens_details": None, "prompt_tokens_details": None}
    shown = {**answer, "id": None, "created": None, "usage": {**answer["usage"], **details}}
    for choice in shown["choices"]:
        choice.pop("prompt_token_ids", None)
    return shown


def test_greedy_answers_with_drafts_are_those_of_transformers(
    client: httpx.Client, base: PreTrainedModel
) -> None:
    for prompt in (PROMPT, list(range(40, 70)), [17]):
        answer = complete(client, prompt=prompt)
        ids = torch.tensor([prompt])
        wanted = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=80,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer["choices"][0]["token_ids"] == wanted[0, len(prompt) :].tolist()
        assert n_accepted(answer) > 20


_ASKED: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.05, "top_p": 0.9, "seed": 3},
    "choices": {"temperature": 0.05, "n": 3, "seed": 3},
    "logprobs": {"logprobs": 4},
    "penalties": {"frequency_penalty": 0.02, "logit_bias": {"7": -100, "12": 0.1}},
    "lengths": {"min_tokens": 30, "max_tokens": 33, "stop_token_ids": list(range(0, 300, 7))},
    "structured": {"guided_json": SCHEMA, "ignore_eos": False, "logprobs": 1, "max_tokens": 300},
}


@pytest.mark.parametrize("adapter", [None, "lora", "mixlora", "alora"])
def test_answers_are_the_same_with_drafts_and_without(
    client: httpx.Client, adapter: str | None
) -> None:
    n_in_all = 0
    for fields in _ASKED.values():
        on, off = (
            complete(client, adapter=adapter, drafts=drafts, **fields) for drafts in (True, False)
        )
        assert "completion_tokens_details" not in off["usage"]
        n_in_all += n_accepted(on)
        assert without_details(on) == without_details(off)
    assert n_in_all > 20


def test_rows_of_a_mixed_batch_answer_with_drafts_as_they_do_alone_without(
    client: httpx.Client,
) -> None:
    asked = [
        {**_ASKED[kind], "adapter": adapter}
        for kind in ("greedy", "seeded", "structured")
        for adapter in (None, "lora", "mixlora", "alora")
    ]
    alone = [complete(client, drafts=False, **fields) for fields in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda fields: complete(client, **fields), asked))
    assert [*map(without_details, together)] == [*map(without_details, alone)]


def _deltas(client: httpx.Client, **fields: Any) -> Sequence[Any]:
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    return [json.loads(line)["choices"] for line in lines]


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2, "adapter": "lora"}], ids=["base", "lora"])
def test_a_stream_has_the_same_chunks_with_drafts_and_without(
    client: httpx.Client, fields: Mapping[str, Any]
) -> None:
    text = complete(client, drafts=False, **fields)["choices"][0]["text"]
    stop = text[40:44]
    for more in ({}, {"stop": stop}, {"return_token_ids": True}):
        on, off = (_deltas(client, drafts=drafts, **fields, **more) for drafts in (True, False))
        assert on == off


def test_a_prediction_is_where_drafts_come_from(
    client: httpx.Client, server: ServerProcess
) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai:

        def ask(**fields: Any) -> Any:
            return openai.chat.completions.create(
                model="base",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=60,
                temperature=0,
                **fields,
            )

        plain = ask(extra_body={"drafts": False})
        text = plain.choices[0].message.content
        predicted = ask(prediction={"type": "content", "content": text})
        in_parts = ask(
            prediction={"type": "content", "content": [{"type": "text", "text": text[:9]}]}
        )
    for answer in (predicted, in_parts):
        assert answer.choices[0].message.content == text
    details = predicted.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 10
    assert details.rejected_prediction_tokens >= 0


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ({"type": "words", "content": "a"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image"}]}, "prediction.content[0]"),
    ],
)
def test_a_prediction_that_is_no_text_is_refused_by_name(
    client: httpx.Client, prediction: Mapping[str, Any], param: str
) -> None:
    body = {"prompt": "a", "max_tokens": 2, "prediction": prediction}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_metrics_count_drafts_and_those_that_were_right(client: httpx.Client) -> None:
    def counted() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        rows = [line.rpartition(" ") for line in lines if line.startswith("vllm:spec_decode")]
        return {name.partition("{")[0]: float(value) for name, _, value in rows}

    before = counted()
    answer = complete(client)
    details = answer["usage"]["completion_tokens_details"]
    grew = {name: value - before[name] for name, value in counted().items()}
    accepted, rejected = details.values()
    assert grew["vllm:spec_decode_num_accepted_tokens_total"] == accepted > 0
    assert grew["vllm:spec_decode_num_draft_tokens_total"] == accepted + rejected
    assert 0 < grew["vllm:spec_decode_num_drafts_total"] <= accepted + rejected
