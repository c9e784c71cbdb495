"""Tools that are held to their schemas, through the app: a random model, markers that are tokens.

jsonschema-rs judges the arguments. What a random model would say by itself is no call.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.asgi_call import events_of
from tests.support.servers.engines import running_engine

pytestmark = pytest.mark.anyio
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}}
    for name in ("get_weather", "get_time")
]
NAMED = {"type": "function", "function": {"name": "get_time"}}
HERMES = (
    "{% if tools %}tools: write <tool_call>\n{...}\n</tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JSON_CALLS = {
    "open": "[CALL]",
    "close": "[/CALL]",
    "content": "json",
    "repeats": True,
    "transform": {"type": "function", "function": "{content}"},
}


def with_markers(*, special: bool) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    names = ("<tool_call>", "</tool_call>", "<think>", "</think>", "[CALL]", "[/CALL]")
    tokenizer.add_tokens([AddedToken(n, special=special, normalized=False) for n in names])
    tokenizer.chat_template = HERMES
    return tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["tokens", "special tokens"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    model = tiny_model(vocab_size=320, max_position_embeddings=2048, eos_token_id=2)
    spec = BaseSpec.of(model, "tiny/hermes")
    with running_engine(model, kv_memory_bytes=8 << 20) as engine:
        folder = tmp_path_factory.mktemp("served")
        tokenizer = with_markers(special=request.param)
        front = make_front(
            tokenizer, spec, folder, packer=engine.packer, engine=engine, vocab_size=320
        )
        front.store.put_directory("own", write_lora(front.root / "own", spec))
        yield front
        asyncio.run(front.app.state.parts.grammars.close())
        front.close()


async def chat(front: Front, **fields: object) -> Any:
    asked = {"temperature": 2, "seed": 11, "max_tokens": 500, "tools": TOOLS, **fields}
    answer = await front.chat(**asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def check(choices: list[Any], names: set[str]) -> None:
    for choice in choices:
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls", choice
        assert message["content"] is None
        for call in message["tool_calls"]:
            assert call["function"]["name"] in names
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(call["function"]["arguments"]))


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
async def test_markers_that_are_tokens_hold_calls(served: Front, choice: object) -> None:
    names = {"get_time"} if choice is NAMED else {"get_time", "get_weather"}
    choices = await chat(served, tool_choice=choice, n=4)
    check(choices, names)
    assert len({json.dumps(c["message"]["tool_calls"][0]["function"]) for c in choices}) > 1
    one = await chat(served, tool_choice=choice, n=4, parallel_tool_calls=False)
    check(one, names)
    assert [len(choice["message"]["tool_calls"]) for choice in one] == [1] * 4


async def test_a_stream_brings_the_same_calls(served: Front) -> None:
    fields = {"tool_choice": "required", "temperature": 2, "seed": 11, "max_tokens": 500}
    (choice,) = await chat(served, **fields)
    answer = await served.chat(**fields, tools=TOOLS, stream=True)
    written: dict[int, str] = {}
    for event in events_of(answer.content)[:-1]:
        for call in event["choices"][0]["delta"].get("tool_calls", []):
            arguments = call["function"]["arguments"]
            written[call["index"]] = written.get(call["index"], "") + arguments
    told = [call["function"]["arguments"] for call in choice["message"]["tool_calls"]]
    assert list(written.values()) == told


async def test_strict_tools_hold_every_call_in_free_text(served: Front) -> None:
    """A bias makes the random model open calls at all."""
    (open_id,) = served.app.state.parts.text.backend.encode("<tool_call>").ids
    choices = await chat(served, n=8, logit_bias={str(open_id): 5, "2": 2})
    ended = [choice for choice in choices if choice["finish_reason"] == "tool_calls"]
    assert ended
    for choice in ended:
        for call in choice["message"]["tool_calls"]:
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(call["function"]["arguments"]))


async def test_answers_that_a_cards_own_template_reads_cannot_be_constrained(
    served: Front,
) -> None:
    template = {"start_anchor": "assistant\n", "fields": {"content": {}, "tool_calls": JSON_CALLS}}
    card = {"defaults": {"response_template": template}}
    answer = await served.client.patch("/v1/adapters/own", json=card)
    assert answer.status_code == 200, answer.text
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for fields, param in (
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice"),
        ({"tools": TOOLS}, "tools"),  # strict
        ({"response_format": wanted}, "response_format.json_schema.schema"),
    ):
        refused = await served.chat(adapter="own", max_tokens=5, **fields)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, param)
        assert error["code"] == "response_template_not_held"
        assert "response_template" in error["message"]
    free = [{"type": "function", "function": {"name": "f"}}]
    assert await chat(served, adapter="own", tools=free, max_tokens=5)
