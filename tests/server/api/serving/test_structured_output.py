"""Structured output through a real server: openai-python asks, jsonschema-rs judges.

The base is random, so what it would say by itself is never valid: what is, the grammar made so.
"""

import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from openai import OpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a long kind of thing", "another"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


class Thing(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    kind: Literal["x", "y"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("structured")
    model = save_tiny_model(folder / "model")
    with server_process(model, folder / "state", "--kv-memory", "256KiB") as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: OpenAI, **fields: Any) -> ChatCompletion:
    asked: dict[str, Any] = {"max_tokens": 300, "temperature": 1.5, "seed": 7, **fields}
    extra = {k: asked.pop(k) for k in list(asked) if k.startswith(("guided", "struct", "min_t"))}
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "hi"}],
        extra_body=extra,
        **asked,
    )
    assert isinstance(answer, ChatCompletion)
    return answer


def text_of(answer: ChatCompletion, index: int = 0) -> str:
    choice = answer.choices[index]
    assert choice.finish_reason == "stop"
    assert choice.message.content is not None
    return choice.message.content


def test_each_choice_follows_the_schema_whatever_is_asked_of_the_sampler(client: OpenAI) -> None:
    seen = set()
    for fields in (
        {"n": 4},
        {"temperature": 0},
        {"temperature": 2, "top_p": 0.9, "presence_penalty": 2, "frequency_penalty": -2},
        {"logit_bias": {"2": 100, "5": 100}},
        {"min_tokens": 200},
        {"stop": ["\n"]},
    ):
        answer = chat(client, response_format=STRICT, **fields)
        for index in range(len(answer.choices)):
            text = text_of(answer, index)
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(text)), text
            seen.add(text)
    assert len(seen) > 6


def test_an_answer_is_the_same_with_log_probabilities_and_streamed(client: OpenAI) -> None:
    plain = chat(client, response_format=STRICT)
    scored = chat(client, response_format=STRICT, logprobs=True, top_logprobs=2)
    assert text_of(scored) == text_of(plain)
    assert plain.usage is not None
    assert _counts(scored.usage) == _counts(plain.usage)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content
    assert entries is not None
    assert len(entries) == plain.usage.completion_tokens
    assert b"".join(bytes(e.bytes or []) for e in entries).decode() == text_of(plain)
    chunks = client.chat.completions.create(
        model=plain.model,
        messages=[{"role": "user", "content": "hi"}],
        response_format=STRICT,  # type: ignore[arg-type]
        max_tokens=300,
        temperature=1.5,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts, usage = [], None
    for chunk in chunks:
        parts += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(parts) == text_of(plain)
    assert _counts(usage) == _counts(plain.usage)


def _counts(usage: CompletionUsage | None) -> tuple[int, int]:
    """Return the tokens of prompt and answer. Guesses depend on the time that steps take."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens


def test_openai_parses_answers_and_streams_into_pydantic_models(client: OpenAI) -> None:
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": "hi"}]
    parsed = client.chat.completions.parse(
        model=model, messages=messages, response_format=Thing, max_tokens=200
    )
    assert isinstance(parsed.choices[0].message.parsed, Thing)
    with client.chat.completions.stream(
        model=model, messages=messages, response_format=Thing, max_tokens=200
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Thing)


@pytest.mark.parametrize("field", ["guided_", "structured_outputs"])
def test_vllms_fields_constrain_chats_and_completions(client: OpenAI, field: str) -> None:
    def ask(kind: str, value: object) -> str:
        extra = {f"guided_{kind}": value} if field == "guided_" else {field: {kind: value}}
        chatted = text_of(chat(client, **extra))
        completed = client.completions.create(
            model=client.models.list().data[0].id,
            prompt="hello",
            max_tokens=300,
            temperature=0,
            extra_body=extra,
        )
        assert completed.choices[0].finish_reason == "stop"
        check(completed.choices[0].text)
        return chatted

    choices = ["yes", "no", "schön 😀", 'a "quoted\\" one']
    for kind, value, right in (
        ("choice", choices, lambda text: text in choices),
        ("regex", "[0-9]{3}-[a-f]{2,4}", lambda t: re.fullmatch("[0-9]{3}-[a-f]{2,4}", t)),
        ("regex", r"^[0-9]{2}(x|y$)$", lambda text: re.fullmatch(r"[0-9]{2}[xy]", text)),
        ("json", SCHEMA, lambda text: jsonschema_rs.is_valid(SCHEMA, json.loads(text))),
        ("json", json.dumps(SCHEMA), lambda t: jsonschema_rs.is_valid(SCHEMA, json.loads(t))),
        ("grammar", 'start: "a" /[bc]{1,3}/ "d"', lambda t: re.fullmatch("a[bc]{1,3}d", t)),
        ("grammar", 'root ::= "x" ("y" | "z") "!"', lambda text: text in ("xy!", "xz!")),
    ):

        def check(text: str, right: Any = right) -> None:
            assert right(text), text

        check(ask(kind, value))


def test_json_object_gives_an_object_and_a_cut_answer_says_length(client: OpenAI) -> None:
    bias = {str(ord("}") - 33 + 3): 100}  # the byte-level alphabet begins at "!", behind 3 specials
    answer = chat(client, response_format={"type": "json_object"}, logit_bias=bias)
    assert isinstance(json.loads(text_of(answer)), dict)
    for limit in (1, 3, 9):
        cut = chat(client, response_format=STRICT, max_tokens=limit)
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage is not None
        assert cut.usage.completion_tokens == limit


def test_a_stop_string_ends_an_answer_in_the_middle_of_what_is_forced(client: OpenAI) -> None:
    answer = chat(client, response_format=STRICT, stop=['"name'])
    assert answer.choices[0].message.content == "{"
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"type": "objct"}}, "guided_json", "objct"),
        ({"guided_regex": "(a"}, "guided_regex", "regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"guided_regex": "a^b"}, "guided_regex", "a^b"),
        ({"guided_regex": r"\bword"}, "guided_regex", "WordUnicode"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar", "nowhere"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", "GBNF"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice", "exclude"),
    ],
)
def test_what_cannot_be_enforced_is_a_400_that_names_it(
    client: OpenAI, fields: dict[str, Any], param: str, told: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **fields)
    assert refused.value.param == param
    assert told in refused.value.message


def test_a_schema_that_is_not_strict_may_say_more_than_is_enforced(client: OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 3, "uniqueItems": True}
    named = {"name": "flags", "schema": schema}
    loose = {"type": "json_schema", "json_schema": {**named, "strict": False}}
    assert isinstance(json.loads(text_of(chat(client, response_format=loose))), list)
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        chat(client, response_format={"type": "json_schema", "json_schema": named})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "uniqueItems": True},
        {
            "type": "object",
            "properties": {"kind": {"enum": ["card", "cash"]}, "number": {"type": "integer"}},
            "required": ["kind"],
            "additionalProperties": False,
            "if": {"properties": {"kind": {"const": "card"}}},
            "then": {"required": ["number"]},
            "else": {"not": {"required": ["number"]}},
        },
        {
            "type": "array",
            "items": {"enum": [1, 2, 3]},
            "contains": {"const": 2},
            "minContains": 2,
            "maxContains": 3,
            "maxItems": 6,
            "not": {"contains": {"const": 3}},
        },
        {
            "type": "object",
            "properties": {"mail": {"type": "boolean"}, "phone": {"type": "boolean"}},
            "additionalProperties": False,
            "oneOf": [{"required": ["mail"]}, {"required": ["phone"]}],
        },
        {"oneOf": [{"enum": [1, 2, 3, 4, None]}, {"type": "integer", "minimum": 3, "maximum": 9}]},
        {"type": "string", "format": "uri-reference", "maxLength": 9},
        {"type": "number", "not": {"type": "integer"}},
    ],
    ids=[
        "different items",
        "condition",
        "contains",
        "one of two",
        "overlapping",
        "format",
        "decimals",
    ],
)
def test_conditions_of_a_schema_hold(client: OpenAI, schema: dict[str, Any]) -> None:
    answers = set()
    for seed in range(12):
        text = text_of(chat(client, guided_json=schema, temperature=2.0, seed=seed))
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text
        answers.add(text)
    assert len(answers) > 2


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_grammar": "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(4000))},
        {"guided_json": {"$ref": "#/$defs/d0", "$defs": {
            f"d{i}": {"$ref": f"#/$defs/d{min(i + 1, 4999)}"} for i in range(5000)}}},
        {"guided_json": {"allOf": [
            {"anyOf": [{"required": [f"p{i}"]}, {"required": [f"q{i}"]}]} for i in range(24)]}},
        {"guided_json": {"const": "long " * 40_000}},
        {"guided_json": {"enum": [f"value {i}" for i in range(40_000)]}},
    ],
    ids=["rules", "references", "products", "constant", "large"],
)  # fmt: skip
def test_grammars_that_explode_are_refused_and_the_server_goes_on(
    client: OpenAI, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, **fields)
    assert text_of(chat(client, guided_choice=["fine"])) == "fine"


@pytest.mark.parametrize(
    "later",
    [r"/(.|\n)*a.{60}b(.|\n)*/ & /(.|\n)*b.{70}a(.|\n)*/ & /.{500}/", "/a+/ & /b+/"],
    ids=["explodes", "dead end"],
)
def test_a_grammar_that_fails_after_its_first_tokens_ends_its_request_alone(
    server: ServerProcess, client: OpenAI, later: str
) -> None:
    hostile = f"start: /[0-9]{{40}}/ LATER\nLATER: {later}"  # beyond what is tried beforehand
    wanted = text_of(chat(client, response_format=STRICT))
    with ThreadPoolExecutor(2) as threads:
        beside = threads.submit(chat, client, response_format=STRICT)
        with pytest.raises(openai.BadRequestError, match="simplify") as refused:
            chat(client, guided_grammar=hostile)
        assert text_of(beside.result()) == wanted
    assert refused.value.code == "grammar_too_complex"
    with urllib.request.urlopen(f"{server.url}/health") as health:
        assert json.load(health)["status"] == "ok"


def test_constrained_rows_change_no_bit_of_their_neighbours(
    server: ServerProcess, client: OpenAI
) -> None:
    free: dict[str, Any] = {"max_tokens": 40, "logprobs": True, "top_logprobs": 5}

    def answer(seed: int) -> object:
        return chat(client, seed=seed, **free).choices[0].model_dump()

    alone = [answer(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as threads:
        constrained = [
            threads.submit(chat, client, response_format=STRICT, seed=seed) for seed in range(4)
        ]
        together = list(threads.map(answer, range(4)))
    assert together == alone
    assert len({text_of(one.result()) for one in constrained}) == 4


def test_the_metric_counts_forced_tokens(server: ServerProcess, client: OpenAI) -> None:
    def forced() -> float:
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
        found = re.search(r"^loraplex_forced_tokens_total(?:\{.*\})? (\S+)", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    before = forced()
    answer = chat(client, guided_choice=["one two three"])
    assert answer.usage is not None
    assert 0 < forced() - before <= answer.usage.completion_tokens
