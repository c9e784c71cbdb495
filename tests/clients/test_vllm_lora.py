"""The calls of vLLM's LoRA documentation: openai-python, and its route that loads adapters."""

import json
import os
import urllib.request
from collections.abc import Callable

import pytest
from openai import NotFoundError, OpenAI

from tests.clients.prompts import HELLO

CLIENT = "openai"


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="EMPTY", timeout=600, max_retries=0)


def test_listed(client: OpenAI) -> None:
    """vLLM's LoRA example: adapters in `models.list()`, `parent` is the base"""
    listed = {model.id: model.model_dump() for model in client.models.list()}
    base = listed["pirate"]["parent"]
    assert listed[base]["parent"] is None
    assert listed["sql"]["parent"] == base


def test_completions(client: OpenAI, complete: Callable[[str, str], str]) -> None:
    """vLLM's LoRA example: `completions.create(model=…)` with the base and adapters"""
    base = next(iter(client.models.list())).id
    for model in (base, "pirate", "sql"):
        answer = client.completions.create(model=model, prompt=HELLO, max_tokens=40, temperature=0)
        assert answer.choices[0].text == complete(model, HELLO)


def test_load_and_unload(client: OpenAI, url: str, complete: Callable[[str, str], str]) -> None:
    """vLLM's `/v1/load_lora_adapter`, the adapter asked, `/v1/unload_lora_adapter`"""
    path = os.environ["LORAPLEX_CLIENTS_ADAPTER"]
    _post(url, "load_lora_adapter", {"lora_name": "sql_adapter", "lora_path": path})
    answer = client.completions.create(
        model="sql_adapter", prompt=HELLO, max_tokens=40, temperature=0
    )
    assert answer.choices[0].text == complete("pirate", HELLO)
    _post(url, "unload_lora_adapter", {"lora_name": "sql_adapter"})
    with pytest.raises(NotFoundError, match="sql_adapter"):
        client.completions.create(model="sql_adapter", prompt=HELLO)


def _post(url: str, route: str, body: dict[str, str]) -> None:
    request = urllib.request.Request(
        f"{url}/v1/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert answer.status == 200
