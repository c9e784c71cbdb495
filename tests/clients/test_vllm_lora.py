"""The requests of vLLM's page on LoRA, docs/features/lora.md in vLLM's repository.

Only address and adapters are ours. The page uses curl; completions are sent with openai-python.
"""

import json
import os
import urllib.request
from collections.abc import Callable

import pytest
from openai import NotFoundError, OpenAI

CLIENT = "openai"
_PROMPT = "San Francisco is a"


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="EMPTY", timeout=600, max_retries=0)


def test_listed(client: OpenAI) -> None:
    """vLLM's LoRA example: adapters in `models.list()`, `parent` is the base"""
    listed = {model.id: model.model_dump() for model in client.models.list()}
    base = listed["pirate"]["parent"]
    assert listed[base]["parent"] is None
    assert listed["sql"]["parent"] == base
    assert all(model["object"] == "model" and model["root"] for model in listed.values())


def test_completions(client: OpenAI, complete: Callable[[str, str], str]) -> None:
    """vLLM's LoRA example: `completions.create(model=…)` with the base and adapters"""
    base = next(iter(client.models.list())).id
    for model in (base, "pirate", "sql"):
        answer = _complete(client, model)
        assert len(answer) > 1
        assert complete(model, _PROMPT).startswith(answer)  # of 40 tokens


def test_load_and_unload(client: OpenAI, url: str, complete: Callable[[str, str], str]) -> None:
    """vLLM's `/v1/load_lora_adapter`, the adapter asked, `/v1/unload_lora_adapter`"""
    path = os.environ["LORAPLEX_CLIENTS_ADAPTER"]
    said = _post(url, "load_lora_adapter", {"lora_name": "sql_adapter", "lora_path": path})
    assert said.startswith("Success: LoRA adapter 'sql_adapter' added successfully")
    assert complete("pirate", _PROMPT).startswith(_complete(client, "sql_adapter"))
    said = _post(url, "unload_lora_adapter", {"lora_name": "sql_adapter"})
    assert said.startswith("Success: LoRA adapter 'sql_adapter' removed successfully")
    with pytest.raises(NotFoundError, match="sql_adapter"):
        _complete(client, "sql_adapter")


def _complete(client: OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt=_PROMPT, max_tokens=7, temperature=0)
    return answer.choices[0].text


def _post(url: str, route: str, body: dict[str, str]) -> str:
    request = urllib.request.Request(
        f"{url}/v1/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert answer.status == 200
        text: str = answer.read().decode()
        return text
