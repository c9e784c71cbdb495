"""The requests of SGLang's documentation, sent to its own routes with `requests`.

Bodies are those of these pages in SGLang's repository; only address, adapters and the base's name
are ours: docs/advanced_features/lora.ipynb, docs/basic_usage/sampling_params.md and
docs/basic_usage/openai_api_completions.ipynb. The sglang package is not installed: its client
part needs all of the engine.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

CLIENT = "requests"

_COUNTRIES = "List 3 countries and their capitals."
_GREEDY = {"max_new_tokens": 32, "temperature": 0}
_PIRATE = os.environ["LORAPLEX_CLIENTS_ADAPTER"]
_TOOLS = str(Path(_PIRATE).with_name("tool-calls"))


def _post(url: str, path: str, **body: Any) -> Any:
    answer = requests.post(url + path, json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def loaded(url: str) -> Iterator[str]:
    """The address of the server, with two adapters loaded as in "Dynamic LoRA loading"."""
    answer = _post(url, "/load_lora_adapter", lora_name="lora0", lora_path=_PIRATE)
    assert answer["success"]
    answer = _post(url, "/load_lora_adapter", lora_name="lora1", lora_path=_TOOLS, pinned=True)
    assert answer["success"]
    assert answer["loaded_adapters"]["lora1"] == _TOOLS
    yield url
    for name in ("lora0", "lora1"):
        assert _post(url, "/unload_lora_adapter", lora_name=name)["success"]


@pytest.mark.parametrize("adapters", [["lora0", None], ["lora0", "lora1"]])
def test_lora_path_of_each(
    loaded: str, complete: Callable[[str, str], str], adapters: list[str | None]
) -> None:
    """SGLang's `/generate`: a list of prompts, a `lora_path` for each, None for the base"""
    body = {"text": [_COUNTRIES] * 2, "sampling_params": _GREEDY, "lora_path": adapters}
    answers = _post(loaded, "/generate", **body)
    names = {"lora0": "pirate", "lora1": "tool-calls", None: "base"}
    for name, answer in zip(adapters, answers, strict=True):
        assert len(answer["text"]) > 1
        assert complete(names[name], _COUNTRIES).startswith(answer["text"])  # of 40 tokens


def test_load_and_unload(loaded: str, complete: Callable[[str, str], str]) -> None:
    """SGLang's `/unload_lora_adapter`, and `/load_lora_adapter` of another under the same name"""
    url = loaded
    asked = {"text": _COUNTRIES, "sampling_params": _GREEDY, "lora_path": "lora0"}
    assert _post(url, "/unload_lora_adapter", lora_name="lora0")["success"]
    gone = requests.post(f"{url}/generate", json=asked, timeout=600)
    assert gone.status_code == 404
    assert "lora0" in gone.text
    assert _post(url, "/load_lora_adapter", lora_name="lora0", lora_path=_TOOLS)["success"]
    assert complete("tool-calls", _COUNTRIES).startswith(_post(url, "/generate", **asked)["text"])


def test_stream(url: str, complete: Callable[[str, str], str]) -> None:
    """SGLang's `/generate` streamed: each event has the text so far"""
    prompt = "The capital of France is"
    body = {"text": prompt, "sampling_params": _GREEDY, "stream": True, "lora_path": "pirate"}
    text = ""
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=600) as answer:
        for line in answer.iter_lines(decode_unicode=False):
            event = line.decode("utf-8")
            if event == "data: [DONE]":
                break
            if event:
                longer = json.loads(event.removeprefix("data:"))["text"]
                assert longer.startswith(text)
                text = longer
        else:
            pytest.fail("the stream had no [DONE]")
    assert len(text) > 1
    assert complete("pirate", prompt).startswith(text)


def test_constraints(url: str) -> None:
    """`sampling_params` with `json_schema`, `regex` and `ebnf`"""
    name = {"type": "string", "pattern": "^[\\w]+$"}
    schema = {
        "type": "object",
        "properties": {"name": name, "population": {"type": "integer"}},
        "required": ["name", "population"],
    }
    greedy = {"temperature": 0, "max_new_tokens": 64}
    prompt = "Here is the information of the capital of France in the JSON format.\n"
    parameters = {**greedy, "json_schema": json.dumps(schema)}
    text = _post(url, "/generate", text=prompt, sampling_params=parameters)["text"]
    assert re.match(r'{\s*"name":\s*"\w+",\s*"population":\s*-?\d+', text)  # may be cut after it

    parameters = {**greedy, "regex": "(France|England)"}
    answer = _post(url, "/generate", text="Paris is the capital of", sampling_params=parameters)
    assert answer["text"] in {"France", "England"}

    parameters = {**greedy, "ebnf": 'root ::= "Hello" | "Hi" | "Hey"'}
    answer = _post(url, "/generate", text="Write a greeting.", sampling_params=parameters)
    assert answer["text"] in {"Hello", "Hi", "Hey"}


def test_adapter_of_a_chat(loaded: str, ask: Callable[[str, str], str]) -> None:
    """SGLang's chats: `model="base:adapter"`, or the older field `lora_path`"""
    prompt = "Convert to SQL: show all users"
    base = requests.get(f"{loaded}/v1/models", timeout=600).json()["data"][0]["id"]
    chat = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 50,
        "temperature": 0,  # the page has none; greedy texts can be compared
    }
    for adapter in ({"model": f"{base}:lora1"}, {"model": base, "lora_path": "lora1"}):
        answer = _post(loaded, "/v1/chat/completions", **chat, **adapter)
        assert answer["choices"][0]["message"]["content"].startswith(ask("tool-calls", prompt))
