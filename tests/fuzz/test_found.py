"""Findings of schemathesis and of the fuzz stay fixed."""

import json
import struct
from typing import Any

import httpx
import pytest

from .adapter_files import CONFIG, HIDDEN, LAYERS, OUT, RANK
from .campaign import Target

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "seed": 1}


def chat(target: Target, **fields: Any) -> httpx.Response:
    return target.client.post("/v1/chat/completions", json={**CHAT, **fields})


def put(target: Target, config: bytes, scale: float, **files: bytes) -> httpx.Response:
    """A LoRA whose factors are all ``scale``."""
    header: dict[str, Any] = {}
    n_bytes = 0
    for layer in range(LAYERS):
        for module, out in OUT.items():
            for part, shape in (("lora_A", [RANK, HIDDEN]), ("lora_B", [out, RANK])):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{part}.weight"
                ends = [n_bytes, n_bytes := n_bytes + 4 * shape[0] * shape[1]]
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": ends}
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + struct.pack("<f", scale) * (n_bytes // 4)
    return target.client.put(
        "/v1/adapters/found", files={"config": config, "weights": weights, **files}
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 5e-324, "temperature": 5e-324},
        {"temperature": 5e-324},
        {"temperature": 1e-40, "top_p": 5e-324, "min_p": 1.0},
        {"repetition_penalty": 1e-38, "temperature": 1e-5},
    ],
)
def test_values_next_to_zero_are_answered(target: Target, fields: dict[str, float]) -> None:
    answer = chat(target, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0


def test_a_temperature_next_to_zero_is_greedy(target: Target) -> None:
    tiny, greedy = chat(target, temperature=5e-324), chat(target, temperature=0)
    assert tiny.json()["choices"] == greedy.json()["choices"]


@pytest.mark.parametrize("field", ["peft_type", "base_model_name_or_path", "note"])
def test_half_of_a_surrogate_pair_is_refused(target: Target, field: str) -> None:
    answer = put(target, json.dumps({**CONFIG, field: "\ud800"}).encode(), 0.1)
    assert answer.status_code == 400, answer.text
    assert "surrogates not allowed" in answer.json()["error"]["message"]
    whole = put(target, json.dumps({**CONFIG, "note": "\U0001f600"}).encode(), 0.1)
    assert "surrogates" not in whole.text


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("number", [b"1" + b"0" * 400, b"1" + b"0" * 4400, b"1e999"])
def test_numbers_beyond_64_bits_are_refused(target: Target, field: str, number: bytes) -> None:
    config = json.dumps({**CONFIG, field: "here"}).encode().replace(b'"here"', number)
    answer = put(target, config, 0.01)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "adapter_refused"
    assert "the number 1" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "template",
    [
        b"{{ 1/0 }}",
        b"{{ [][5].x }}",
        b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        b"{{ messages[0].content.nothing.at.all }}",
        b"{{ 'x' + 1 }}",
    ],
)
def test_a_template_that_fails_is_the_adapters_fault(target: Target, template: bytes) -> None:
    stored = put(target, json.dumps(CONFIG).encode(), 0.01, chat_template=template)
    assert stored.status_code in (200, 201), stored.text
    answer = chat(target, adapter="found")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "chat_template_error"


@pytest.mark.parametrize("sampling", [{"temperature": 1}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_an_adapter_that_overflows_is_told_so(target: Target, sampling: dict[str, float]) -> None:
    stored = put(target, json.dumps(CONFIG).encode(), 3e18)
    if stored.status_code != 400:
        assert stored.status_code in (200, 201), stored.text
        answer = chat(target, adapter="found", **sampling)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "adapter_unservable"
        assert "scale" in answer.json()["error"]["message"]
    assert chat(target).status_code == 200
