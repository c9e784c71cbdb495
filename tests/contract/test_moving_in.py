"""What clients of other servers send is followed or refused, and never ignored.

The oracles are the official clients, `jsonschema_rs` and Python's own `re` and `decimal`.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import anthropic
import httpx
import jsonschema_rs
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from openai import BadRequestError, OpenAI

from tests.support.servers.server_process import ServerProcess

from .conftest import ADMIN, INFER

SCHEMA = {"type": "boolean"}
BOOLEAN, LETTERS, WORDS = "true|false", "[ab]{3}", "yes|no"
GBNF = 'root ::= "yes" | "no"'
ASKED: list[Any] = [{"role": "user", "content": "Say it."}]


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {INFER}", "anthropic-version": "2023-06-01"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=INFER, max_retries=0) as client:
        yield client


def chat(client: OpenAI, n: int = 1, **fields: object) -> list[str]:
    """Return ``n`` answers that ended by themselves."""
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, n=n, seed=3, max_tokens=60, extra_body=fields
    )
    return [str(c.message.content) for c in answer.choices if c.finish_reason == "stop"]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, BOOLEAN),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, BOOLEAN),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, BOOLEAN),
        ({"response_format": {"type": "json", "value": json.dumps(SCHEMA)}}, BOOLEAN),
        ({"response_format": {"type": "regex", "value": LETTERS}}, LETTERS),
        ({"json_schema": json.dumps(SCHEMA)}, BOOLEAN),
        ({"json_schema": SCHEMA}, BOOLEAN),
        ({"regex": LETTERS}, LETTERS),
        ({"ebnf": GBNF}, WORDS),
        ({"grammar": GBNF}, WORDS),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_constraint_under_another_servers_name_is_enforced(
    client: OpenAI, fields: dict[str, object], pattern: str
) -> None:
    (text,) = chat(client, **fields)
    assert re.fullmatch(pattern, text)


def test_the_schema_of_huggingface_hub_is_enforced(server: ServerProcess) -> None:
    client = InferenceClient(base_url=f"{server.url}/v1", api_key=INFER)
    schema = {"type": "array", "items": SCHEMA, "minItems": 2, "maxItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = client.chat_completion(
        ASKED,
        model="tiny",
        max_tokens=40,
        response_format=form,  # type: ignore[arg-type]
    )
    jsonschema_rs.validate(schema, json.loads(answer.choices[0].message.content))


def test_text_generation_of_huggingface_hub_answers_as_completions_do(
    server: ServerProcess, client: OpenAI
) -> None:
    tgi = InferenceClient(model=server.url, token=INFER)
    for adapter in (None, "one", "org/three"):
        wanted = client.completions.create(
            model=adapter or "tiny", prompt="hi there", max_tokens=9, temperature=0, logprobs=0
        )
        text = wanted.choices[0].text
        options: dict[str, Any] = {"max_new_tokens": 9, "adapter_id": adapter}
        assert tgi.text_generation("hi there", **options) == text
        assert "".join(tgi.text_generation("hi there", **options, stream=True)) == text
        full = tgi.text_generation("hi there", **options, details=True, return_full_text=True)
        assert full.generated_text == f"hi there{text}"
        assert (full.details.finish_reason, full.details.generated_tokens) == ("length", 9)
        assert wanted.choices[0].logprobs is not None
        logprobs = [token.logprob for token in full.details.tokens]
        assert logprobs == pytest.approx(wanted.choices[0].logprobs.token_logprobs, abs=1e-4)
        last = list(tgi.text_generation("hi there", **options, stream=True, details=True))[-1]
        assert (last.generated_text, last.details.generated_tokens) == (text, 9)
    grammar = {"type": "regex", "value": LETTERS}
    assert re.fullmatch(LETTERS, tgi.text_generation("x", grammar=grammar, max_new_tokens=20))
    pieces = list(tgi.text_generation("x", grammar=grammar, stream=True, details=True))
    assert re.fullmatch(LETTERS, "".join(piece.token.text for piece in pieces))
    assert re.fullmatch(LETTERS, str(pieces[-1].generated_text))
    assert httpx.post(server.url, json={"inputs": "x"}).status_code == 401
    for wrong in ({"adapter_id": "one"}, {"model": "one"}, {"parameters": {"lora": "one"}}):
        answer = httpx.post(
            f"{server.url}/generate",
            json={"inputs": "x", **wrong},
            headers={"Authorization": f"Bearer {INFER}"},
        )
        assert answer.status_code == 400
        assert "name the adapter in 'parameters.adapter_id'" in answer.json()["error"]["message"]
    with pytest.raises(HfHubHTTPError, match="prompts are not truncated"):
        tgi.text_generation("x", truncate=3)
    with pytest.raises(HfHubHTTPError, match="nobody"):
        tgi.text_generation("x", adapter_id="nobody")


def test_anthropics_older_output_format_is_enforced(http: httpx.Client) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 20, "output_format": form}
    answer = http.post("/v1/messages", json=body).json()
    assert re.fullmatch(BOOLEAN, answer["content"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object", "grammar": "x"}}, "response_format.grammar"),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "x"}},
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        *[
            ({name: value}, name)
            for name, value in {
                "format": "json",
                "structural_tag": "{}",
                "best_of": 2,
                "logits_processors": ["x"],
                "typical_p": 0.5,
                "mirostat": 2,
                "thinking_token_budget": 8,
                "return_tokens_as_token_ids": True,
                "web_search_options": {},
                "moderation": {"model": "x"},
                "guided_whitespace_pattern": " ",
            }.items()
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    client: OpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(BadRequestError) as raised:
        chat(client, **fields)
    assert (raised.value.param, raised.value.code) == (param, "unsupported_parameter")


def _bounds(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    yield {"allOf": [{"type": schema["type"], key: schema[key]} for key in schema if key != "type"]}


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0, "exclusiveMaximum": 0.001},
        {"exclusiveMinimum": 1, "maximum": 1.5},
        {"exclusiveMinimum": 10, "exclusiveMaximum": 10.01},
        {"minimum": -0.001, "exclusiveMaximum": 0},
        {"minimum": -1e20, "maximum": 0.5},
    ],
    ids=str,
)
def test_numbers_keep_their_bounds(client: OpenAI, bounds: dict[str, Any]) -> None:
    for schema in _bounds({"type": "number", **bounds}):
        answers = chat(client, 8, guided_json=schema)
        assert answers
        for text in answers:
            number = Decimal(text)
            assert number >= Decimal(str(bounds.get("minimum", "-Infinity")))
            assert number > Decimal(str(bounds.get("exclusiveMinimum", "-Infinity")))
            assert number <= Decimal(str(bounds.get("maximum", "Infinity")))
            assert number < Decimal(str(bounds.get("exclusiveMaximum", "Infinity")))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 2**63, "maximum": 2**64 - 1},
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3},
        {"type": "number", "minimum": 2**63 + 1, "maximum": 2**63 + 3},
        {"enum": [2**53 + 1]},
        {"const": -(2**63)},
    ],
    ids=str,
)
def test_a_number_that_cannot_be_exact_is_refused(client: OpenAI, schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="exact") as raised:
        chat(client, guided_json=schema)
    assert raised.value.code == "invalid_grammar"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": SCHEMA, "maxItems": 2, "uniqueItems": False},
        {"type": "array", "items": SCHEMA, "maxItems": 1, "uniqueItems": True},
        {**SCHEMA, "if": {"const": True}, "minContains": 2, "dependencies": {}},
        {"type": "object", "maxProperties": 0, "propertyNames": {"type": "string"}},
        {
            "type": "object",
            "properties": {"a": SCHEMA},
            "required": ["a"],
            "unevaluatedProperties": False,
        },
        {  # dict[Literal["r", "g"], bool] of Pydantic
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/Colour"},
            "additionalProperties": SCHEMA,
            "$defs": {"Colour": {"enum": ["r", "g"], "type": "string"}},
        },
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"enum": [True], "format": "path"},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_keywords_without_effect_pass_and_the_rest_is_enforced(
    client: OpenAI, schema: dict[str, Any]
) -> None:
    answers = chat(client, 4, guided_json=schema)
    assert answers
    for text in answers:
        jsonschema_rs.validate(schema, json.loads(text))
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    if schema.get("type") == "object":
        chat(client, tools=[tool], tool_choice="required")


def test_without_strict_only_what_cannot_be_enforced_is_left_out(client: OpenAI) -> None:
    for odd in (
        {"type": "string", "pattern": "(?=a)b", "maxLength": 3},
        {"type": "string", "pattern": "(a)\\1", "maxLength": 3},
        {"type": "integer", "minimum": 2**60},
    ):
        form = {"name": "x", "schema": odd, "strict": False}
        answers = chat(client, 4, response_format={"type": "json_schema", "json_schema": form})
        kept = {key: odd[key] for key in odd.keys() - {"pattern", "minimum"}}
        for text in answers:
            jsonschema_rs.validate(kept, json.loads(text))
        with pytest.raises(BadRequestError):
            chat(client, guided_json=odd)


@pytest.mark.parametrize("form", ["time", "date-time"])
def test_times_have_sixty_seconds(client: OpenAI, form: str) -> None:
    day = "2026-01-02T" if form == "date-time" else ""
    schema = {"type": "string", "format": form, "pattern": f"^{day}13:20:(60|59)Z$"}
    assert set(chat(client, 8, guided_json=schema)) == {f'"{day}13:20:59Z"'}


def test_formats_of_pydantic_are_annotations(client: OpenAI) -> None:
    for name in ("path", "binary", "password", "ipv4network", "base64url", "regex"):
        assert chat(client, guided_json={"enum": ["x"], "type": "string", "format": name}) == [
            '"x"'
        ]


def test_a_prompt_that_is_too_long_says_so_in_each_apis_words(
    client: OpenAI, claude: anthropic.Anthropic
) -> None:
    for n_words, n_output, words in (
        (9000, 8, "prompt is too long: "),
        (3, 9000, "exceed context limit: "),
    ):
        turns: list[Any] = [{"role": "user", "content": "a " * n_words}]
        with pytest.raises(BadRequestError) as of_openai:
            client.chat.completions.create(model="tiny", messages=turns, max_tokens=n_output)
        assert of_openai.value.code == "context_length_exceeded"
        assert "This model's maximum context length is " in of_openai.value.message
        with pytest.raises(anthropic.BadRequestError, match=words):
            claude.messages.create(model="tiny", messages=turns, max_tokens=n_output)


def test_a_stored_response_streams_again(client: OpenAI) -> None:
    first = client.responses.create(model="one", input="hi", max_output_tokens=8)
    events = list(client.responses.retrieve(first.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == first.output_text
    last = events[-1]
    assert last.type == f"response.{first.status}"  # completed, where it ended by itself
    assert last.response.output == first.output
    rest = list(client.responses.retrieve(first.id, stream=True, starting_after=2))
    assert [event.sequence_number for event in rest] == list(range(3, len(events)))


def test_every_name_that_chats_accept_is_a_model(client: OpenAI, http: httpx.Client) -> None:
    digest = http.get("/v1/adapters/one").json()["digest"]
    for name in ("tiny", "base", "one", "base:one", "tiny:org/three", f"one@{digest[:6]}"):
        assert client.models.retrieve(name).id == name
        answer = client.chat.completions.create(model=name, messages=ASKED, max_tokens=1)
        assert answer.model == name
    for name in ("nobody", f"one@{'0' * 8}", "base:nobody"):
        assert http.get(f"/v1/models/{name}").status_code == 404


def test_anthropics_client_pages_through_the_models(
    client: OpenAI, claude: anthropic.Anthropic
) -> None:
    names = [model.id for model in client.models.list()]
    page = claude.models.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert [model.id for model in page] == names
    model = claude.models.retrieve("one")
    assert (model.type, model.display_name, model.created_at.year > 2000) == ("model", "one", True)


def _native(http: httpx.Client, body: dict[str, Any]) -> Any:
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _bench(prompt: str | list[int], adapter: str | None, *, stream: bool) -> dict[str, Any]:
    """Return the body that `sglang.bench_serving` posts."""
    return {
        "text" if isinstance(prompt, str) else "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 9, "ignore_eos": True},
        "stream": stream,
        "lora_path": adapter,
        "return_logprob": True,
        "return_routed_experts": False,
        "logprob_start_len": -1,
    }


def test_sglangs_generate_answers_as_completions_do(http: httpx.Client, client: OpenAI) -> None:
    prompt = "hi there"
    ids = http.post("/tokenize", json={"model": "tiny", "prompt": prompt}).json()["tokens"]
    for adapter in ("", "one", "org/three"):
        wanted = client.completions.create(
            model=adapter or "tiny",
            prompt=prompt,
            max_tokens=9,
            temperature=0,
            logprobs=2,
            extra_body={"ignore_eos": True, "return_token_ids": True, "prompt_logprobs": 2},
        ).choices[0]
        assert wanted.logprobs is not None
        extra: Any = wanted.model_extra
        for asked in (prompt, ids):
            answer = _native(http, _bench(asked, adapter, stream=False))
            assert (answer["text"], answer["output_ids"]) == (wanted.text, extra["token_ids"])
            meta = answer["meta_info"]
            assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), 9)
            assert meta["finish_reason"] == {"type": "length", "length": 9}
            assert meta["input_token_logprobs"] == []
            logprobs, answered, texts = zip(*meta["output_token_logprobs"], strict=True)
            assert logprobs == pytest.approx(wanted.logprobs.token_logprobs, abs=1e-4)
            assert [*answered] == extra["token_ids"]
            assert {*texts} == {None}
        shown = {"logprob_start_len": 1, "top_logprobs_num": 2, "return_text_in_logprobs": True}
        meta = _native(http, {**_bench(prompt, adapter, stream=False), **shown})["meta_info"]
        for number, (logprob, token_id, text) in enumerate(meta["input_token_logprobs"], 1):
            told = extra["prompt_logprobs"][number][str(token_id)]
            assert (token_id, text) == (ids[number], told["decoded_token"])
            assert logprob == pytest.approx(told["logprob"], abs=1e-4)
        assert len(meta["input_token_logprobs"]) == len(ids) - 1
        assert {len(top) for top in meta["output_top_logprobs"]} == {2}
        with http.stream("POST", "/generate", json=_bench(prompt, adapter, stream=True)) as stream:
            *events, end = [line for line in stream.iter_lines() if line]
        assert end == "data: [DONE]"
        told = [json.loads(event.removeprefix("data: ")) for event in events]
        assert [each["meta_info"]["finish_reason"] is None for each in told] == [True] * (
            len(told) - 1
        ) + [False]
        assert told[-1]["text"] == wanted.text
        assert all(wanted.text.startswith(each["text"].rstrip("\ufffd")) for each in told)
        assert told[-1]["meta_info"]["output_token_logprobs"] == [
            [pytest.approx(logprob, abs=1e-4), token_id, None]
            for logprob, token_id in zip(
                wanted.logprobs.token_logprobs or [], extra["token_ids"], strict=True
            )
        ]


def test_each_prompt_of_sglangs_batch_has_its_adapter(http: httpx.Client) -> None:
    one = _bench("hi there", "one", stream=False)
    base = {**_bench("what", None, stream=False), "sampling_params": {"temperature": 0, "n": 2}}
    batch = {
        **one,
        "text": ["hi there", "what"],
        "lora_path": ["one", None],
        "sampling_params": [one["sampling_params"], base["sampling_params"]],
    }
    response = http.post("/generate", json=batch)
    answers = response.json()
    assert len(answers) == 3, response.text
    calls = http.get("/v1/requests").json()["data"]
    (call,) = [each for each in calls if each["id"] == response.headers["x-request-id"]]
    assert (call["n_choices"], call["status"]) == (3, 200)
    n_prompt = answers[0]["meta_info"]["prompt_tokens"] + answers[1]["meta_info"]["prompt_tokens"]
    assert call["prompt_tokens"] == n_prompt
    alone = [_native(http, one), *_native(http, base)]
    assert [each["output_ids"] for each in answers] == [each["output_ids"] for each in alone]
    assert len(_native(http, {"text": ["hi"], "sampling_params": {"max_new_tokens": 2}})) == 1
    ids = _native(http, {"input_ids": [[5, 6], [7]], "sampling_params": {"max_new_tokens": 2}})
    assert [each["meta_info"]["prompt_tokens"] for each in ids] == [2, 1]
    text = _native(http, {"text": "x", "sampling_params": {"regex": LETTERS}})["text"]
    assert re.fullmatch(LETTERS, text)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"lora_path": "nobody"}, "lora_path"),
        ({"text": ["x", "y"], "lora_path": ["one", "nobody"]}, "lora_path"),
        ({"text": ["x", "y"], "lora_path": ["one"]}, "lora_path"),
        ({"text": ["x", "y"], "stream": True}, "stream"),
        ({"lora": "one"}, "lora"),
        ({"sampling_params": {"lora_path": "one"}}, "lora_path"),
        ({"sampling_params": {"temperature": 9}}, "temperature"),
        ({"sampling_params": {"custom_params": {"x": 1}}}, "custom_params"),
        ({"sampling_params": 3}, "sampling_params"),
        ({"image_data": "x"}, "image_data"),
        ({"input_ids": [1]}, "text"),
        ({"input_ids": [10**6], "text": None}, "input_ids"),
        ({"return_logprob": True, "logprob_start_len": 0, "stream": True}, "logprob_start_len"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_sglangs_generate_cannot_do_is_refused_by_name(
    http: httpx.Client, wrong: dict[str, Any], param: str
) -> None:
    answer = http.post("/generate", json={"text": "x", **wrong})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_sglangs_routes_load_and_unload_adapters(server: ServerProcess, http: httpx.Client) -> None:
    admin = {"Authorization": f"Bearer {ADMIN}"}
    load = {"lora_name": "again", "lora_path": "one"}
    assert http.post("/load_lora_adapter", json=load).status_code == 403  # the key may only ask
    outside = {"lora_name": "passwd", "lora_path": "/etc"}
    assert http.post("/load_lora_adapter", json=outside, headers=admin).status_code == 403
    loaded = http.post("/load_lora_adapter", json=load, headers=admin)
    assert loaded.json() == {
        "success": True,
        "error_message": "",
        "loaded_adapters": {"again": "one"},
    }, loaded.text
    again, one = (_native(http, _bench("hi", name, stream=False)) for name in ("again", "one"))
    assert again["output_ids"] == one["output_ids"]
    twice = http.post("/load_lora_adapter", json=load, headers=admin)
    assert (twice.status_code, "already been loaded" in twice.text) == (400, True)
    name = {"lora_name": "again"}
    assert http.post("/unload_lora_adapter", json=name, headers=admin).json()["success"] is True
    assert http.post("/generate", json=_bench("hi", "again", stream=False)).status_code == 404
