"""Tools in chats, over a scripted engine: what is rendered, refused, parsed and streamed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.api.serving.chat import message_parser
from loraplex_server.api.serving.chat.message_parser import MessageParser, ParserSpec
from tests.server.conftest import Front, make_front
from tests.support.servers.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "strict": True}}
CALL = (
    '<tool_call>[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}]</tool_call>'
)


LONG_ARGUMENTS = json.dumps({"text": "x" * 500_000})  # three are more than is read


@pytest.fixture
def front(front: Front) -> Front:
    front.engine.max_model_len = 4096  # the family's system turn is long for a tiny tokenizer
    return front


@pytest.fixture
def roomy(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    """Its context holds tens of thousands of tokens."""
    engine = FakeEngine(tokenizer.backend_tokenizer, max_model_len=1 << 16)
    front = make_front(tokenizer, base_spec, tmp_path, engine=engine)
    yield front
    front.close()


def prompt_of(front: Front, number: int = -1) -> str:
    ids = front.engine.requests[number].prompt_ids
    return front.engine.tokenizer.decode(list(ids), skip_special_tokens=False)


def openai_client(front: Front) -> AsyncOpenAI:
    transport = httpx.ASGITransport(front.app)
    http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000/v1")
    return AsyncOpenAI(
        base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http, max_retries=0
    )


async def test_a_call_is_taken_out_of_the_text(front: Front) -> None:
    front.engine.answer = f"Let me see. {CALL}"
    choice = (await front.chat(tools=[WEATHER])).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Zürich", "days": 3}


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>[{"name": "get_time", "arguments": {}}, '
        '{"name": "get_weather", "arguments": {"city": "x"}}]</tool_call>',
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "parameters": {"city": "x"}}\n</tool_call>',
        '<tool_call>[{"arguments": "{}", "name": "get_time"},'
        '{"name":"get_weather","arguments":"{\\"city\\": \\"x\\"}"}]</tool_call>',
    ],
)
async def test_arrays_and_single_objects_are_understood(front: Front, answer: str) -> None:
    front.engine.answer = answer
    body = (await front.chat(tools=[WEATHER, TIME])).json()
    message = body["choices"][0]["message"]
    called = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]
    assert called == [("get_time", {}), ("get_weather", {"city": "x"})]
    assert message["content"] is None
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_only_the_first_call_counts_without_parallel_calls(front: Front) -> None:
    front.engine.answer = CALL + CALL
    body = (await front.chat(tools=[WEATHER], parallel_tool_calls=False)).json()
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>no call at all</tool_call>",
        '<tool_call>[{"foo": 1}]</tool_call>',
        '<tool_call>[{"name": 3}]</tool_call>',
        '<tool_call>{"na',
        '<tool_call>{"name": "get_weather</tool_call>',
        '<tool_call>{"arguments": {"city": "Oslo"}</tool_call>',
        'Well: <tool_call>\n{"na\n</tool_call> or <tool_call>[{</tool_call>, as you like',
        "plain text with <tool",
    ],
)
async def test_what_is_no_call_stays_content_to_the_letter(front: Front, answer: str) -> None:
    front.engine.answer = answer
    choice = (await front.chat(tools=[WEATHER])).json()["choices"][0]
    assert choice["message"]["content"] == answer
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    events = await front.chat_events(tools=[WEATHER])
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1]) == answer


async def test_an_empty_list_of_calls_is_no_call(front: Front) -> None:
    front.engine.answer = "<tool_call>[]</tool_call>"
    choice = (await front.chat(tools=[WEATHER])).json()["choices"][0]
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "stop"


async def test_a_call_that_is_cut_off_says_length(front: Front) -> None:
    front.engine.answer = CALL
    n_whole = len(front.engine.tokenizer.encode(CALL, add_special_tokens=False).ids)
    choice = (await front.chat(tools=[WEATHER], max_tokens=n_whole - 8)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert CALL.find(call["function"]["arguments"]) > 0


async def test_openais_client_puts_the_stream_together(front: Front) -> None:
    """The name comes first and once; the arguments come in pieces that make JSON."""
    front.engine.answer = f"Hm. {CALL}"

    class GetWeather(BaseModel):
        """Weather of a city"""

        city: str
        days: int

    tool = pydantic_function_tool(GetWeather, name="get_weather")
    async with openai_client(front) as client:
        deltas = []
        async with client.chat.completions.stream(
            model="base", messages=[{"role": "user", "content": "hi"}], tools=[tool]
        ) as stream:
            async for event in stream:
                if event.type == "chunk":
                    deltas += event.chunk.choices[0].delta.tool_calls or []
            final = await stream.get_final_completion()
    assert [d.function.name for d in deltas if d.function and d.function.name] == ["get_weather"]
    assert deltas[0].id
    assert not any(d.id for d in deltas[1:])
    assert len(deltas) > 3
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="Zürich", days=3)
    assert final.choices[0].message.content == "Hm."
    assert final.choices[0].finish_reason == "tool_calls"


async def test_several_choices_keep_their_own_calls(front: Front) -> None:
    front.engine.answer = CALL
    events = await front.chat_events(tools=[WEATHER], n=2)
    for index in (0, 1):
        deltas = [
            c["delta"]["tool_calls"][0]
            for e in events[:-1]
            for c in e["choices"]
            if c["index"] == index and "tool_calls" in c["delta"]
        ]
        arguments = "".join(d["function"]["arguments"] for d in deltas)
        assert json.loads(arguments) == {"city": "Zürich", "days": 3}


async def test_tools_calls_and_results_are_rendered_in_the_familys_form(front: Front) -> None:
    front.engine.answer = CALL
    client = openai_client(front)
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    answer = await client.chat.completions.create(model="base", messages=messages, tools=[WEATHER])  # type: ignore[list-item]
    messages.append(answer.choices[0].message)
    call_id = answer.choices[0].message.tool_calls[0].id  # type: ignore[index]
    messages.append({"role": "tool", "tool_call_id": call_id, "content": '{"sky": "blue"}'})
    front.engine.answer = "It is blue."
    answer = await client.chat.completions.create(model="base", messages=messages, tools=[WEATHER])  # type: ignore[list-item]
    assert answer.choices[0].message.content == "It is blue."
    prompt = prompt_of(front)
    assert "<tools>[" + json.dumps(WEATHER, ensure_ascii=False) + "]</tools>" in prompt
    assert prompt.endswith(
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n<|im_start|>user\n"
        '<tool_response>{"sky": "blue"}</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ("null", "{}"),
        ("[]", "{}"),
        ("", "{}"),
        (None, "{}"),
        ("[1]", "[1]"),
        ('{"a": "cut', json.dumps('{"a": "cut')),
    ],
)
async def test_what_a_model_wrote_as_arguments_can_be_sent_back(
    front: Front, written: str | None, shown: str
) -> None:
    asked = {"role": "user", "content": "x"}
    function = {"name": "get_time", "arguments": written}
    call = {"id": "a", "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": "a", "content": "no"}
    turns = [asked, {"role": "assistant", "tool_calls": [call]}, result]
    answer = await front.chat(messages=turns, tools=[TIME])
    assert answer.status_code == 200, answer.text
    assert f'"get_time", "arguments": {shown}}}]</tool_call>' in prompt_of(front)
    if written is None:  # a string there
        return
    item = {"type": "function_call", "call_id": "a", "name": "get_time", "arguments": written}
    output = {"type": "function_call_output", "call_id": "a", "output": "no"}
    body = {
        "model": "base",
        "input": [asked, item, output],
        "tools": [{"type": "function", **TIME["function"]}],
    }
    answer = await front.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    assert prompt_of(front, -1) == prompt_of(front, -2)


async def test_a_streams_parser_is_made_once_for_each_choice(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a response template, and with it the whole prompt."""
    made: list[MessageParser] = []

    def counted(spec: ParserSpec) -> MessageParser:
        made.append(MessageParser(spec))
        return made[-1]

    monkeypatch.setattr(message_parser, "MessageParser", counted)
    await front.chat_events(tools=[WEATHER], n=2)
    assert len(made) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_tool_may_be_described_at_length(roomy: Front, path: str) -> None:
    """Coding agents tell their whole manual."""
    told = {"name": "edit", "description": "the server keeps one base. " * 500 + "The end."}
    tool, turns = {"type": "function", **told}, [{"role": "user", "content": "hi"}]
    body: dict[str, object] = {"messages": turns, "tools": [{"type": "function", "function": told}]}
    if path == "/v1/messages":
        tool = {**told, "input_schema": {"type": "object"}}
        body = {"messages": turns, "max_tokens": 9, "tools": [tool]}
    elif path == "/v1/responses":
        body = {"input": "hi", "tools": [tool]}
    answer = await roomy.post(path, {"model": "base", **body})
    assert answer.status_code == 200, answer.text
    assert "one base. The end." in prompt_of(roomy)


async def test_tool_choice_none_shows_and_parses_nothing(front: Front) -> None:
    front.engine.answer = CALL
    body = (await front.chat(tools=[WEATHER], tool_choice="none")).json()
    assert body["choices"][0]["message"]["content"] == CALL
    assert "get_weather" not in prompt_of(front)


async def test_a_named_choice_offers_that_tool_alone(front: Front) -> None:
    choice = {"type": "function", "function": {"name": "get_time"}}
    await front.chat(tools=[WEATHER, TIME], tool_choice=choice)
    prompt = prompt_of(front)
    assert "get_time" in prompt
    assert "get_weather" not in prompt


@pytest.mark.parametrize(
    ("choice", "tools", "constrained"),
    [
        ("auto", [WEATHER], False),
        ("auto", [WEATHER, TIME], True),  # one is strict
        ("required", [WEATHER], True),
        ({"type": "function", "function": {"name": "get_weather"}}, [WEATHER], True),
        ("none", [TIME], False),
    ],
)
async def test_who_is_constrained(
    front: Front, choice: object, tools: list[object], constrained: bool
) -> None:
    await front.chat(tools=tools, tool_choice=choice)
    assert (front.engine.requests[0].grammar is not None) is constrained


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "'x', which is not among tools (get_time)",
        ),
        ({"tools": [TIME, TIME]}, "tools[1].function.name", "two tools are called 'get_time'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None, "pattern"),
        ({"tools": [{"type": "web_search"}]}, None, "function"),
        ({"tools": [TIME], "tool_choice": "any"}, None, "required"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "obj"}, "strict": True},
                    }
                ]
            },
            "tools",
            "obj",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": LONG_ARGUMENTS}}],
                    },
                ]
                * 3
            },
            "messages",
            "at most 1,048,576 are read",
        ),
    ],
)
async def test_a_mistake_is_named(
    front: Front, fields: dict[str, object], param: str | None, says: str
) -> None:
    answer = await front.chat(**fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    if param is not None:
        assert error["param"] == param
    assert not front.engine.requests
