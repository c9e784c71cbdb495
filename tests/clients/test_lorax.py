"""lorax-client."""

import asyncio
from collections.abc import Callable

import pytest
from lorax import AsyncClient, Client
from lorax.errors import NotFoundError

from tests.clients.prompts import HELLO
from tests.clients.trip import PLAN, Trip

CLIENT = "lorax-client"


@pytest.fixture
def client(url: str) -> Client:
    return Client(url, timeout=600)


@pytest.mark.parametrize("adapter", ["pirate", "sentiment"])
def test_generate(client: Client, complete: Callable[[str, str], str], adapter: str) -> None:
    """`generate(adapter_id=…)`, and its details"""
    answer = client.generate(HELLO, adapter_id=adapter, max_new_tokens=40)
    assert answer.generated_text == complete(adapter, HELLO)
    assert answer.details is not None
    assert answer.details.generated_tokens == len(answer.details.tokens) > 1
    assert "".join(token.text for token in answer.details.tokens if not token.special) == (
        answer.generated_text
    )


def test_base(client: Client, complete: Callable[[str, str], str]) -> None:
    """`generate()` without an adapter: the base"""
    answer = client.generate(HELLO, max_new_tokens=40)
    assert answer.generated_text == complete("base", HELLO)


def test_stream(client: Client, complete: Callable[[str, str], str]) -> None:
    """`generate_stream(adapter_id=…)`, its details at the end"""
    events = list(client.generate_stream(HELLO, adapter_id="pirate", max_new_tokens=40))
    text = "".join(event.token.text for event in events if not event.token.special)
    assert text == events[-1].generated_text == complete("pirate", HELLO)
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == len(events)


def test_async(url: str, complete: Callable[[str, str], str]) -> None:
    """`AsyncClient`, several adapters at a time"""
    client = AsyncClient(url, timeout=600)
    adapters = ["pirate", "sentiment", "tool-calls"]

    async def all_of_them() -> list[str]:
        answers = await asyncio.gather(
            *(client.generate(HELLO, adapter_id=name, max_new_tokens=40) for name in adapters)
        )
        return [answer.generated_text for answer in answers]

    assert asyncio.run(all_of_them()) == [complete(name, HELLO) for name in adapters]


def test_response_format(client: Client) -> None:
    """`response_format` with the schema of a Pydantic class"""
    form = {"type": "json_object", "schema": Trip.model_json_schema()}
    answer = client.generate(PLAN, response_format=form, max_new_tokens=60)
    Trip.model_validate_json(answer.generated_text)


def test_unknown_adapter(client: Client) -> None:
    """an adapter that is not there: the client's own error"""
    with pytest.raises(NotFoundError, match="nobody"):
        client.generate(HELLO, adapter_id="nobody")
