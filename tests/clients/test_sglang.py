"""The calls of SGLang's documentation, which are `requests` to its own routes.

The sglang package is not installed: its client part needs all of the engine.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import requests

from tests.clients.prompts import HELLO

CLIENT = "requests"

_GREEDY = {"max_new_tokens": 40, "temperature": 0}


def _post(url: str, path: str, **body: Any) -> Any:
    answer = requests.post(url + path, json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_lora_path_of_each(url: str, complete: Callable[[str, str], str]) -> None:
    """SGLang's `/generate`: a list of prompts, a `lora_path` for each, None for the base"""
    prompts = [HELLO, HELLO, "List 3 countries and their capitals."]
    paths = ["pirate", "sentiment", None]
    body = {"text": prompts, "sampling_params": _GREEDY, "lora_path": paths}
    answers = _post(url, "/generate", **body)
    wanted = [complete(path or "base", text) for path, text in zip(paths, prompts, strict=True)]
    assert [answer["text"] for answer in answers] == wanted
    assert all(answer["meta_info"]["completion_tokens"] > 1 for answer in answers)


def test_load_and_unload(url: str, complete: Callable[[str, str], str]) -> None:
    """SGLang's `/load_lora_adapter`, the adapter asked, `/unload_lora_adapter`"""
    path = os.environ["LORAPLEX_CLIENTS_ADAPTER"]
    loaded = _post(url, "/load_lora_adapter", lora_name="lora0", lora_path=path)
    assert loaded["success"]
    assert loaded["loaded_adapters"] == {"lora0": path}
    asked = {"text": HELLO, "sampling_params": _GREEDY, "lora_path": "lora0"}
    assert _post(url, "/generate", **asked)["text"] == complete("pirate", HELLO)
    assert _post(url, "/unload_lora_adapter", lora_name="lora0")["success"]
    gone = requests.post(f"{url}/generate", json=asked, timeout=600)
    assert gone.status_code == 404
    assert "lora0" in gone.text


def test_stream(url: str, complete: Callable[[str, str], str]) -> None:
    """SGLang's `/generate` streamed: each event has the text so far"""
    body = {"text": HELLO, "sampling_params": _GREEDY, "lora_path": "pirate", "stream": True}
    text = ""
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=600) as answer:
        for line in answer.iter_lines(decode_unicode=False):  # as the documentation reads them
            event = line.decode("utf-8")
            if event.startswith("data:"):
                if event == "data: [DONE]":
                    break
                data = json.loads(event[5:].strip("\n"))
                assert data["text"].startswith(text)
                text = data["text"]
        else:
            pytest.fail("the stream had no [DONE]")
    assert text == complete("pirate", HELLO)


def test_json_schema(url: str) -> None:
    """`sampling_params.json_schema` and `regex`"""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": "^[\\w]+$"}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    body = {**_GREEDY, "max_new_tokens": 128, "json_schema": json.dumps(schema)}
    text = _post(url, "/generate", text="The capital of France, in JSON:", sampling_params=body)
    assert json.loads(text["text"]).keys() == {"name", "n"}
    body = {**_GREEDY, "regex": "(Paris|London)"}
    answer = _post(url, "/generate", text="Paris is the capital of", sampling_params=body)
    assert answer["text"] in {"Paris", "London"}
