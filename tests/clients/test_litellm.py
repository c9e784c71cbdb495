"""LiteLLM."""

import json
from collections.abc import Callable
from typing import Any

import litellm
import pytest

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "litellm"


def _complete(url: str, model: str, text: str, **options: Any) -> Any:
    return litellm.completion(
        model=f"openai/{model}",
        api_base=f"{url}/v1",
        api_key="none",
        messages=[{"role": "user", "content": text}],
        timeout=600,
        max_retries=0,
        temperature=0,
        max_tokens=40,
        **options,
    )


def test_stream(url: str, ask: Callable[[str, str], str]) -> None:
    """`completion(stream=True)` through an adapter"""
    chunks = list(_complete(url, "pirate", "Hello!", stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == ask("pirate", "Hello!")
    assert len(chunks) > 2


def test_overflow(url: str) -> None:
    """a prompt that is too long: the error that `context_window_fallbacks` wait for"""
    with pytest.raises(litellm.ContextWindowExceededError):
        _complete(url, "base", "a " * 20_000)


def test_response_format(url: str) -> None:
    """`completion(response_format=…)` with a Pydantic class"""
    answer = _complete(url, "base", PLAN, response_format=Trip)
    Trip.model_validate_json(answer.choices[0].message.content)


def test_tools(url: str) -> None:
    """`completion(tools=…)`, required"""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
    }
    function = {"name": "get_weather", "description": "Weather of a city", "parameters": schema}
    answer = _complete(
        url,
        "tool-calls",
        WEATHER,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
    )
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Oslo"},
    )


def test_embedding(url: str) -> None:
    """`embedding()`"""
    answer = litellm.embedding(
        model="openai/all-minilm-l6-v2",
        api_base=f"{url}/v1",
        api_key="none",
        input=["a small cat", "a kitten", "the stock market fell"],
    )
    cat, kitten, market = (item["embedding"] for item in answer.data)
    assert sum(map(float.__mul__, cat, kitten)) > sum(map(float.__mul__, cat, market)) + 0.2
