"""The official openai client's ``responses`` against a real server: answers are those of chats."""

import json

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from .conftest import ADAPTERS

ASKED = "Grüße 😀"
CALL = {"model": "tiny", "input": ASKED, "max_output_tokens": 12, "temperature": 0}


def chat(client: OpenAI, *messages: dict[str, str], **fields: object) -> str:
    given = {"model": "tiny", "max_tokens": 12, "temperature": 0} | fields
    turns = messages or ({"role": "user", "content": ASKED},)
    return str(client.chat.completions.create(messages=turns, **given).choices[0].message.content)


def test_an_answer_is_that_of_a_chat(client: OpenAI) -> None:
    response = client.responses.create(**CALL, metadata={"a": "b"})
    assert response.output_text == chat(client)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == response.usage.input_tokens + 12


def test_every_form_of_an_adapter_answers_as_in_a_chat(client: OpenAI) -> None:
    for name in ADAPTERS:
        expected = chat(client, model=name)
        assert client.responses.create(**{**CALL, "model": name}).output_text == expected
        for adapter in (name, [{"name": name, "weight": 1.0}]):
            response = client.responses.create(**CALL, extra_body={"adapter": adapter})
            assert response.output_text == expected


def test_a_conversation_goes_on_from_what_is_kept(client: OpenAI) -> None:
    first = client.responses.create(**CALL, instructions="be brief")
    second = client.responses.create(**{**CALL, "input": "more"}, previous_response_id=first.id)
    turns = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "more"},
    ]
    assert second.output_text == chat(client, *turns)  # instructions are not carried over
    assert client.responses.create(**{**CALL, "input": turns}).output_text == second.output_text
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(**CALL, previous_response_id=first.id)
    assert raised.value.param == "previous_response_id"
    unkept = client.responses.create(**CALL, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_the_stream_helper_builds_the_same_response(client: OpenAI) -> None:
    whole = client.responses.create(**CALL)
    events = list(client.responses.create(**CALL, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    kept = client.responses.retrieve(events[-1].response.id)
    assert kept.output_text == whole.output_text


class Animal(BaseModel):
    kind: bool
    wild: bool


def test_an_answer_follows_a_schema_whole_and_streamed(client: OpenAI) -> None:
    call = {**CALL, "max_output_tokens": 60, "text_format": Animal}
    parsed = client.responses.parse(**call).output_parsed
    assert isinstance(parsed, Animal)
    with client.responses.stream(**call) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == parsed
    assert final.status == "completed"


def test_tools_are_called_and_their_results_are_taken(client: OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"far": {"type": "boolean"}},
        "required": ["far"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "name": "look", "parameters": parameters, "strict": True}
    call = {**CALL, "max_output_tokens": 80, "tools": [tool], "tool_choice": "required"}
    call["parallel_tool_calls"] = False
    response = client.responses.create(**call)
    (item,) = response.output
    assert item.type == "function_call"
    assert item.name == "look"
    assert isinstance(json.loads(item.arguments)["far"], bool)
    with client.responses.stream(**call) as stream:
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (item.name, item.arguments)
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "a tree"}
    by_id = client.responses.create(
        **{**CALL, "input": [result]}, tools=[tool], previous_response_id=response.id
    )
    turns = [{"role": "user", "content": ASKED}, item.model_dump(exclude_none=True), result]
    by_items = client.responses.create(**{**CALL, "input": turns}, tools=[tool])
    assert by_id.output_text == by_items.output_text
    assert by_id.usage is not None
    assert by_items.usage is not None
    assert by_id.usage.input_tokens == by_items.usage.input_tokens


def test_a_call_that_was_cut_off_is_shown_but_does_not_go_on(client: OpenAI) -> None:
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    call = {**CALL, "tools": [tool], "tool_choice": "required"}
    for limit in (8, 20, 30):
        cut = client.responses.create(**{**call, "max_output_tokens": limit})
        assert cut.status == "incomplete"
        again = client.responses.create(**CALL, previous_response_id=cut.id)
        assert again.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_output_tokens": 100_000}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, "reasoning.summary"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"extra_body": {"n": 2}}, "n"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#/no"}}}},
            "text.format.schema",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused_by_name(
    client: OpenAI, fields: dict[str, object], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(**{**CALL, **fields}, stream=stream)
        assert raised.value.param == param
