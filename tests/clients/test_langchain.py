"""LangChain, by its package for OpenAI."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "langchain-openai"


def _chat(url: str, model: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=f"{url}/v1",
        api_key="none",
        timeout=600,
        max_retries=0,
        temperature=0,
        max_tokens=40,
        **options,
    )


def test_stream(url: str, ask: Callable[[str, str], str]) -> None:
    """`stream()` through an adapter"""
    chunks = [chunk.content for chunk in _chat(url, "pirate").stream("Hello!")]
    assert "".join(chunks) == ask("pirate", "Hello!")
    assert len(chunks) > 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(url: str, method: Literal["json_schema", "function_calling"]) -> None:
    """`with_structured_output`, both by JSON schema and by a call"""
    answer = _chat(url, "base").with_structured_output(Trip, method=method).invoke(PLAN)
    assert isinstance(answer, Trip)


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Weather of a city"""
    return f"rain in {city}"


def test_bind_tools(url: str) -> None:
    """`bind_tools`, the tool run, its message sent back"""
    chat = _chat(url, "tool-calls")
    answer = chat.bind_tools([get_weather], tool_choice="any").invoke(WEATHER)
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [
        ("get_weather", {"city": "Oslo"})
    ]
    result = get_weather.invoke(answer.tool_calls[0])
    assert isinstance(result, ToolMessage)
    told = [HumanMessage(WEATHER), answer, result]
    after = chat.bind_tools([get_weather], tool_choice="none").invoke(told)
    assert "rain" in str(after.content)


def test_embeddings(url: str) -> None:
    """`OpenAIEmbeddings` with `check_embedding_ctx_length=False`"""
    vectors = OpenAIEmbeddings(
        model="all-minilm-l6-v2",
        base_url=f"{url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,
    )
    documents = vectors.embed_documents(["a small cat", "the stock market fell"])
    query = vectors.embed_query("a kitten")
    near, far = (sum(x * y for x, y in zip(query, d, strict=True)) for d in documents)
    assert near > far + 0.2


def test_responses(url: str) -> None:
    """`ChatOpenAI(use_responses_api=True)` with `bind_tools`"""
    chat = _chat(url, "tool-calls", use_responses_api=True)
    answer = chat.bind_tools([get_weather], tool_choice="any").invoke(WEATHER)
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [
        ("get_weather", {"city": "Oslo"})
    ]
