"""huggingface_hub's InferenceClient, by TGI's routes."""

import asyncio
import re
from collections.abc import Callable

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.prompts import HELLO
from tests.clients.trip import PLAN, Trip

CLIENT = "huggingface_hub"


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(model=url, timeout=600)


@pytest.mark.parametrize("adapter", ["pirate", "sentiment"])
def test_generate(
    client: InferenceClient, complete: Callable[[str, str], str], adapter: str
) -> None:
    """`text_generation(adapter_id=…)`, whole and streamed"""
    text = complete(adapter, HELLO)
    assert client.text_generation(HELLO, adapter_id=adapter, max_new_tokens=40) == text
    pieces = client.text_generation(HELLO, adapter_id=adapter, max_new_tokens=40, stream=True)
    assert "".join(pieces) == text


def test_details(client: InferenceClient, complete: Callable[[str, str], str]) -> None:
    """`text_generation(details=True)`: tokens, their number, why it ended"""
    answer = client.text_generation(
        HELLO, adapter_id="pirate", max_new_tokens=40, details=True, decoder_input_details=False
    )
    assert answer.generated_text == complete("pirate", HELLO)
    assert answer.details.generated_tokens == len(answer.details.tokens) > 1
    assert answer.details.finish_reason in {"eos_token", "length"}


def test_async(url: str, complete: Callable[[str, str], str]) -> None:
    """`AsyncInferenceClient`, several adapters at a time"""
    adapters = ["pirate", "sentiment", "tool-calls"]

    async def all_of_them() -> list[str]:
        async with AsyncInferenceClient(model=url, timeout=600) as client:
            return await asyncio.gather(
                *(
                    client.text_generation(HELLO, adapter_id=name, max_new_tokens=40)
                    for name in adapters
                )
            )

    assert asyncio.run(all_of_them()) == [complete(name, HELLO) for name in adapters]


def test_grammar(client: InferenceClient) -> None:
    """`text_generation(grammar=…)`, both by JSON schema and by a regular expression"""
    schema = {"type": "json", "value": Trip.model_json_schema()}
    Trip.model_validate_json(client.text_generation(PLAN, grammar=schema, max_new_tokens=60))
    letters = {"type": "regex", "value": "[ab]{3}"}
    assert re.fullmatch("[ab]{3}", client.text_generation(PLAN, grammar=letters))


def test_chat(url: str, ask: Callable[[str, str], str]) -> None:
    """`chat_completion(model=…)` through an adapter"""
    answer = InferenceClient(base_url=f"{url}/v1", timeout=600).chat_completion(
        [{"role": "user", "content": "Hello!"}], model="pirate", temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.content == ask("pirate", "Hello!")


def test_unknown_adapter(client: InferenceClient) -> None:
    """an adapter that is not there: an error that names it"""
    with pytest.raises(HfHubHTTPError, match="nobody"):
        client.text_generation(HELLO, adapter_id="nobody")
