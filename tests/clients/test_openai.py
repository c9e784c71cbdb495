"""openai-python."""

from collections.abc import Callable

import pytest
from openai import OpenAI, pydantic_function_tool

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "openai"


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)


def test_parse(client: OpenAI) -> None:
    """`chat.completions.parse()` into a Pydantic class"""
    answer = client.chat.completions.parse(
        model="base", messages=[{"role": "user", "content": PLAN}], response_format=Trip
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)


def test_stream_helper(client: OpenAI, ask: Callable[[str, str], str]) -> None:
    """`chat.completions.stream()` through an adapter named in `extra_body`"""
    with client.chat.completions.stream(
        model="base",
        messages=[{"role": "user", "content": "Hello!"}],
        temperature=0,
        max_tokens=40,
        extra_body={"adapter": "pirate"},
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message.content
    assert "".join(deltas) == final == ask("pirate", "Hello!")
    assert len(deltas) > 1


def test_stream_of_parsed(client: OpenAI) -> None:
    """`chat.completions.stream()` into a Pydantic class"""
    with client.chat.completions.stream(
        model="base", messages=[{"role": "user", "content": PLAN}], response_format=Trip
    ) as stream:
        done = [event.parsed for event in stream if event.type == "content.done"]
    assert len(done) == 1
    assert isinstance(done[0], Trip)


@pytest.mark.parametrize("model", ["base", "tool-calls"])
def test_tools(client: OpenAI, model: str) -> None:
    """a required tool, its arguments parsed, its result sent back"""
    messages: list = [{"role": "user", "content": PLAN}]
    tools = [pydantic_function_tool(Trip, name="book")]
    answer = client.chat.completions.parse(
        model=model,
        messages=messages,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,  # else the grammar lets a base write calls without end
        max_tokens=200,
    )
    calls = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Trip) for call in calls)
    messages.append(answer.choices[0].message.to_dict())
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "booked"} for c in calls]
    after = client.chat.completions.create(
        model=model, messages=messages, tools=tools, tool_choice="none", max_tokens=20
    )
    assert after.choices[0].message.content


def test_stream_of_tools(client: OpenAI) -> None:
    """a required tool in `chat.completions.stream()`"""
    with client.chat.completions.stream(
        model="base",
        messages=[{"role": "user", "content": WEATHER}],
        tools=[pydantic_function_tool(Trip, name="book")],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == ["book"]
    assert isinstance(done[0].parsed_arguments, Trip)


def test_responses(client: OpenAI, ask: Callable[[str, str], str]) -> None:
    """`responses.parse()`, and `responses.stream()` through an adapter"""
    answer = client.responses.parse(model="base", input=PLAN, text_format=Trip)
    assert isinstance(answer.output_parsed, Trip)
    with client.responses.stream(
        model="pirate", input="Hello!", temperature=0, max_output_tokens=40
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ask("pirate", "Hello!")


def test_embeddings(client: OpenAI) -> None:
    """embeddings, base64 as it asks by itself, and floats"""
    texts = ["a small cat", "a kitten", "the stock market fell"]
    packed = client.embeddings.create(model="all-minilm-l6-v2", input=texts).data
    plain = client.embeddings.create(
        model="all-minilm-l6-v2", input=texts, encoding_format="float"
    ).data
    cat, kitten, market = (item.embedding for item in packed)
    assert cat == pytest.approx(plain[0].embedding, abs=1e-6)
    assert _dot(cat, cat) == pytest.approx(1, abs=1e-3)
    assert _dot(cat, kitten) > _dot(cat, market) + 0.2


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
