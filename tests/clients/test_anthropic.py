"""Anthropic's client."""

from collections.abc import Callable

import pytest
from anthropic import Anthropic

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "anthropic"


@pytest.fixture
def client(url: str) -> Anthropic:
    return Anthropic(base_url=url, api_key="none", timeout=600, max_retries=0)


def test_stream(client: Anthropic, ask: Callable[[str, str], str]) -> None:
    """`messages.stream()` through an adapter"""
    with client.messages.stream(
        model="pirate",
        max_tokens=40,
        messages=[{"role": "user", "content": "Hello!"}],
        extra_body={"temperature": 0},
    ) as stream:
        parts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(parts) == final.content[0].text == ask("pirate", "Hello!")
    assert len(parts) > 1


def test_count_tokens(client: Anthropic) -> None:
    """`messages.count_tokens()`, the number that an answer then reports"""
    messages: list = [{"role": "user", "content": PLAN}]
    counted = client.messages.count_tokens(model="base", messages=messages)
    answer = client.messages.create(model="base", max_tokens=1, messages=messages)
    read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == read


def test_parse(client: Anthropic) -> None:
    """`messages.parse()` into a Pydantic class"""
    answer = client.messages.parse(
        model="base",
        max_tokens=60,
        messages=[{"role": "user", "content": PLAN}],
        output_format=Trip,
    )
    assert isinstance(answer.parsed_output, Trip)


def test_tools(client: Anthropic) -> None:
    """a required tool, its result sent back"""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
    }
    tools: list = [
        {"name": "get_weather", "description": "Weather of a city", "input_schema": schema}
    ]
    messages: list = [{"role": "user", "content": WEATHER}]
    answer = client.messages.create(
        model="tool-calls",
        max_tokens=60,
        messages=messages,
        tools=tools,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body={"temperature": 0},
    )
    call = next(block for block in answer.content if block.type == "tool_use")
    assert (answer.stop_reason, call.name, call.input) == (
        "tool_use",
        "get_weather",
        {"city": "Oslo"},
    )
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain in Oslo"}
    messages += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(
        model="tool-calls",
        max_tokens=40,
        messages=messages,
        tools=tools,
        tool_choice={"type": "none"},
        extra_body={"temperature": 0},
    )
    assert "rain" in after.content[0].text
