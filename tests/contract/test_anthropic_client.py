"""The official anthropic client against a real server: answers are those of the chat route."""

import json
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.support.servers.server_process import ServerProcess

from .conftest import ADAPTERS, INFER

TURNS = [{"role": "user", "content": "Grüße 😀"}]
GREEDY = {"temperature": 0}  # the client has no such argument any more
CALL = {"model": "tiny", "messages": TURNS, "max_tokens": 12, "extra_body": GREEDY}


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key=INFER, max_retries=0) as client:
        yield client


def chat(client: OpenAI, **fields: object) -> str:
    given = {"model": "tiny", "messages": TURNS, "max_tokens": 12, "temperature": 0} | fields
    return str(client.chat.completions.create(**given).choices[0].message.content)


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content)


def test_an_answer_is_that_of_a_chat(claude: Anthropic, client: OpenAI) -> None:
    message = claude.messages.create(**CALL)
    assert text_of(message) == chat(client)
    assert message.stop_reason == "max_tokens"
    assert message.id.startswith("msg_")
    asked = client.chat.completions.create(model="tiny", messages=TURNS, max_tokens=12)
    usage = message.usage
    assert asked.usage is not None
    assert usage.input_tokens + usage.cache_read_input_tokens == asked.usage.prompt_tokens
    assert usage.output_tokens == 12
    assert message._request_id is not None


def test_every_form_of_an_adapter_answers_as_in_a_chat(claude: Anthropic, client: OpenAI) -> None:
    seen = {chat(client)}
    for name in ADAPTERS:
        expected = chat(client, model=name)
        assert text_of(claude.messages.create(**{**CALL, "model": name})) == expected
        mixture = [{"name": name, "weight": 1.0}]
        for adapter in (name, mixture):
            message = claude.messages.create(
                **{**CALL, "extra_body": {**GREEDY, "adapter": adapter}}
            )
            assert text_of(message) == expected
        raw = claude.messages.with_raw_response.create(**{**CALL, "model": name})
        assert raw.headers["x-loraplex-adapter"].startswith(f"{name}@")
        seen.add(expected)
    assert len(seen) == 1 + len(ADAPTERS)


def test_the_stream_helper_builds_the_same_message(claude: Anthropic) -> None:
    whole = claude.messages.create(**CALL)
    with claude.messages.stream(**CALL) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 1
    assert "".join(texts) == text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 12
    events = [event.type for event in claude.messages.create(**CALL, stream=True)]
    assert events[:2] == ["message_start", "content_block_start"]
    assert set(events[2:-3]) == {"content_block_delta"}
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_system_blocks_and_turns_are_the_chats_messages(claude: Anthropic, client: OpenAI) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    system = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    messages = [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "one\ntwo"},
        *turns[2:],
    ]
    message = claude.messages.create(**{**CALL, "messages": turns}, system=system)
    assert text_of(message) == chat(client, messages=messages)
    counted = claude.messages.count_tokens(model="tiny", messages=turns, system=system)
    url = str(client.base_url).removesuffix("v1/") + "tokenize"
    headers = {"Authorization": f"Bearer {INFER}"}
    tokens = httpx.post(url, json={"messages": messages}, headers=headers, timeout=60).json()
    assert counted.input_tokens == tokens["count"]


def test_the_answer_goes_on_where_an_assistant_turn_ends(claude: Anthropic, client: OpenAI) -> None:
    turns = [*TURNS, {"role": "assistant", "content": "The best answer is ("}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    expected = chat(client, messages=turns, extra_body=extra)
    assert text_of(claude.messages.create(**{**CALL, "messages": turns})) == expected


def test_a_stop_sequence_is_named(claude: Anthropic) -> None:
    whole = text_of(claude.messages.create(**CALL))
    stop = whole[5:8]
    message = claude.messages.create(**CALL, stop_sequences=[stop])
    assert text_of(message) == whole[: whole.index(stop)]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_an_answer_follows_a_schema(claude: Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    message = claude.messages.create(**{**CALL, "max_tokens": 60}, output_config=config)
    assert json.loads(text_of(message))["kind"] in ("cat", "dog")
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("fields", "error", "kind", "param"),
    [
        ({"model": "gpt-9"}, anthropic.NotFoundError, "not_found_error", "model"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
        (
            {"extra_body": {"stop": "x"}},
            anthropic.BadRequestError,
            "invalid_request_error",
            "stop",
        ),
        (
            {"extra_body": {"n": 2}},
            anthropic.BadRequestError,
            "invalid_request_error",
            "n",
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            anthropic.BadRequestError,
            "invalid_request_error",
            "thinking",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            anthropic.BadRequestError,
            "invalid_request_error",
            "messages[0].content[0]",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"$ref": "#/no"}}}},
            anthropic.BadRequestError,
            "invalid_request_error",
            "output_config.format.schema",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_have_anthropics_form(
    claude: Anthropic,
    fields: dict[str, object],
    error: type[anthropic.APIStatusError],
    kind: str,
    param: str,
) -> None:
    for stream in (False, True):
        with pytest.raises(error) as raised:
            claude.messages.create(**{**CALL, **fields}, stream=stream)
        body = raised.value.body
        assert isinstance(body, dict)
        assert body["type"] == "error"
        assert body["error"]["type"] == kind
        assert body["error"]["param"] == param


def test_a_wrong_key_is_refused_and_both_headers_are_taken(server: ServerProcess) -> None:
    with Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as raised:
            client.messages.create(**CALL)
        assert raised.value.body["error"]["type"] == "authentication_error"
    with Anthropic(base_url=server.url, auth_token=INFER, max_retries=0) as client:
        assert text_of(client.messages.create(**CALL))


def test_tools_are_called_and_their_results_are_taken(claude: Anthropic, client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"far": {"type": "boolean"}},
        "required": ["far"],
        "additionalProperties": False,
    }
    tool = {"name": "look", "input_schema": schema}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    call = {**CALL, "max_tokens": 80, "tools": [tool]}
    message = claude.messages.create(**call, tool_choice=choice)
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.name == "look"
    assert isinstance(block.input["far"], bool)
    assert message.stop_reason == "tool_use"
    with claude.messages.stream(**call, tool_choice=choice) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    assert final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "a tree"}
    turns = [
        *TURNS,
        {
            "role": "assistant",
            "content": [block.model_dump(include={"type", "id", "name", "input"})],
        },
        {"role": "user", "content": [result]},
    ]
    function = {"name": "look", "arguments": json.dumps(block.input)}
    chat_turns = [
        *TURNS,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": block.id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": block.id, "content": "a tree"},
    ]
    offered = {"type": "function", "function": {"name": "look", "parameters": schema}}
    expected = chat(client, messages=chat_turns, tools=[offered])
    answer = claude.messages.create(**{**CALL, "messages": turns}, tools=[tool])
    assert text_of(answer) == expected
