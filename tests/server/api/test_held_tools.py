"""Tools that are held to their schemas, through the app: a random model, markers that are tokens.

jsonschema-rs judges the arguments. What a random model would say by itself is no call.
"""

from __future__ import annotations

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
from tests.support.architectures import tiny_model
from tests.support.asgi_call import events_of
from tests.support.engines import running_engine
from tests.support.lora_files import write_lora
from tests.support.tiny_tokenizer import tiny_tokenizer

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
THINKING = {"open": "<think>", "close": "</think>"}
LIST_TO_THE_END = {
    "open": "[CALLS]",
    "content": "json",
    "transform": {"function": {"name": "{name}", "arguments": "{parameters}"}},
    "transform_each": True,
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


async def with_template(front: Front, **fields: object) -> None:
    template = {"start_anchor": "assistant\n", "fields": fields}
    for defaults in (None, {"response_template": template}):  # a patch merges
        answer = await front.client.patch("/v1/adapters/own", json={"defaults": defaults})
        assert answer.status_code == 200, answer.text


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


@pytest.mark.parametrize(
    "fields",
    [
        {"content": {}, "tool_calls": JSON_CALLS},
        {"tool_calls": JSON_CALLS},
        {"content": {}, "thinking": THINKING, "tool_calls": JSON_CALLS},
        {"content": {}, "tool_calls": LIST_TO_THE_END},
    ],
    ids=["single", "no content", "reasoning", "list to the end"],
)
async def test_calls_are_written_as_the_adapters_own_template_reads_them(
    served: Front, fields: dict[str, Any]
) -> None:
    from transformers.utils.chat_parsing import parse_response

    await with_template(served, **fields)
    choices = await chat(served, adapter="own", tool_choice="required", n=3, return_token_ids=True)
    check(choices, {"get_time", "get_weather"})
    template = {"start_anchor": "\0", "fields": fields}
    for choice in choices:
        # transformers' own parser judges, where no string holds a marker
        backend = served.app.state.parts.text.backend
        text = backend.decode(choice["token_ids"], skip_special_tokens=False)
        if text.count("[/CALL]") > len(choice["message"]["tool_calls"]):
            continue
        read = parse_response(text, template, prefix="")["tool_calls"]
        told = [call["function"] for call in choice["message"]["tool_calls"]]
        assert [call["function"]["name"] for call in read] == [call["name"] for call in told]
        assert [c["function"]["arguments"] for c in read] == [
            json.loads(call["arguments"]) for call in told
        ]


XML = {"open": "<f>", "close": "</f>", "content": "kv-lines"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"content": {}, "tool_calls": XML}, "no JSON"),
        ({"content": {}}, "no field tool_calls"),
        ({"content": {}, "thinking": {"open": "<think>"}, "tool_calls": JSON_CALLS}, "thinking"),
        ({"thinking": {"close": "</think>"}, "tool_calls": JSON_CALLS}, "thinking"),
    ],
)
async def test_what_a_template_would_not_read_is_refused_and_not_constrained(
    served: Front, fields: dict[str, Any], why: str
) -> None:
    await with_template(served, **fields)
    for choice, param in (("required", "tool_choice"), (NAMED, "tool_choice"), ("auto", "tools")):
        answer = await served.chat(adapter="own", tools=TOOLS, tool_choice=choice, max_tokens=5)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert error["code"] == "response_template_not_held"
        assert "response_template" in error["message"]
        if choice != "auto":  # there the text between the calls is looked at first
            assert why in error["message"]
    free = [{"type": "function", "function": {"name": "f"}}]
    assert await chat(served, adapter="own", tools=free, max_tokens=5)


async def test_a_response_format_stands_where_the_template_reads_content(served: Front) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    await with_template(served, content={}, thinking=THINKING, tool_calls=JSON_CALLS)
    fields = {"adapter": "own", "response_format": wanted, "n": 4}
    choices = await chat(served, **fields, tools=None, max_tokens=1200)
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert ended  # reasoning of a random model may go on for long
    for choice in ended:
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(choice["message"]["content"]))
    final = {"open": "<final>", "close": "</final>"}
    await with_template(served, content=final, tool_calls=JSON_CALLS)
    answer = await served.chat(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "response_template_not_held"
    assert answer.json()["error"]["param"] == "response_format.json_schema.schema"
    check(await chat(served, adapter="own", tool_choice="required"), {"get_weather", "get_time"})
