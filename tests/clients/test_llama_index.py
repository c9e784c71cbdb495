"""LlamaIndex, by its packages for servers that speak OpenAI's API."""

from collections.abc import Callable
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "llama-index-llms-openai-like"


def _llm(url: str, model: str) -> OpenAILike:
    return OpenAILike(
        model=model,
        api_base=f"{url}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        timeout=600,
        max_retries=0,
        temperature=0,
        max_tokens=40,
    )


def test_stream(url: str, ask: Callable[[str, str], str]) -> None:
    """`stream_chat` through an adapter"""
    parts = list(_llm(url, "pirate").stream_chat([ChatMessage("Hello!")]))
    assert parts[-1].message.content == ask("pirate", "Hello!")
    assert len(parts) > 2


def test_structured(url: str) -> None:
    """`structured_predict`"""
    answer = _llm(url, "base").structured_predict(Trip, PromptTemplate(PLAN))
    assert isinstance(answer, Trip)


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]


def get_weather(city: str) -> str:
    """Weather of a city"""
    return f"rain in {city}"


def test_tools(url: str) -> None:
    """`predict_and_call` with a tool"""
    tool = FunctionTool.from_defaults(get_weather, fn_schema=Place)
    answer = _llm(url, "tool-calls").predict_and_call([tool], user_msg=WEATHER, tool_required=True)
    assert answer.response == "rain in Oslo"


def test_embeddings(url: str) -> None:
    """`OpenAILikeEmbedding`"""
    embedding = OpenAILikeEmbedding(
        model_name="all-minilm-l6-v2", api_base=f"{url}/v1", api_key="none", timeout=600
    )
    near, far = embedding.get_text_embedding_batch(["a small cat", "the stock market fell"])
    query = embedding.get_query_embedding("a kitten")
    assert embedding.similarity(query, near) > embedding.similarity(query, far) + 0.2
