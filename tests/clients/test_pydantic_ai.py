"""Pydantic AI."""

from collections.abc import Callable
from typing import Literal

from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.clients.trip import PLAN, WEATHER, Trip

CLIENT = "pydantic-ai-slim"


def _model(url: str, name: str) -> OpenAIChatModel:
    return OpenAIChatModel(
        name,
        provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"),
        settings=ModelSettings(temperature=0, max_tokens=40),
    )


def test_text(url: str, ask: Callable[[str, str], str]) -> None:
    """`run_sync` through an adapter"""
    assert Agent(_model(url, "pirate")).run_sync("Hello!").output == ask("pirate", "Hello!")


def test_native_output(url: str) -> None:
    """`NativeOutput`: the answer follows the JSON schema"""
    agent = Agent(_model(url, "base"), output_type=NativeOutput(Trip))
    assert isinstance(agent.run_sync(PLAN).output, Trip)


def test_output_tool(url: str) -> None:
    """`output_type`: a required call holds the answer"""
    assert isinstance(Agent(_model(url, "base"), output_type=Trip).run_sync(PLAN).output, Trip)


def test_tools(url: str) -> None:
    """an agent calls a tool and answers with its result"""
    cities = []

    def get_weather(city: Literal["Oslo", "Rome"]) -> dict[str, str]:
        """Weather of a city"""
        cities.append(city)
        return {"weather": "rain"}  # as the adapter was trained, so that it calls no further tool

    answer = Agent(_model(url, "tool-calls"), tools=[get_weather]).run_sync(WEATHER)
    assert cities == ["Oslo"]
    assert "rain" in answer.output


def test_responses(url: str) -> None:
    """`OpenAIResponsesModel` with `output_type`"""
    model = OpenAIResponsesModel(
        "base",
        provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"),
        settings=ModelSettings(temperature=0, max_tokens=60),
    )
    assert isinstance(Agent(model, output_type=Trip).run_sync(PLAN).output, Trip)


def test_messages(url: str) -> None:
    """`AnthropicModel` with `output_type`"""
    model = AnthropicModel(
        "base",
        provider=AnthropicProvider(base_url=url, api_key="none"),
        settings=ModelSettings(temperature=0, max_tokens=60),
    )
    assert isinstance(Agent(model, output_type=Trip).run_sync(PLAN).output, Trip)
