"""Every bad value is a 400 in OpenAI's shape that names the field, and disturbs nobody."""

import asyncio
import logging

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_server.api.json_size import MAX_VALUES
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.api.protocol.completion import CompletionBody
from tests.server.conftest import Front

pytestmark = pytest.mark.anyio
JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response) -> dict[str, object]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["code"], str)
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", "0.7"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("n", 0),
        ("n", 10_000),
        ("n", True),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_completion_tokens", 0),
        ("min_tokens", 1000),
        ("seed", 1 << 63),
        ("seed", "x"),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", {"abc": 1}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", [1]),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 1001),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**6]),
        ("stop_token_ids", "5"),
        ("logprobs", 5),
        ("top_logprobs", 21),
        ("top_logprobs", 3),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", "hi"),
        ("messages", None),
        ("messages", [{"content": "no role"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("model", 5),
        ("adapter", 5),
        ("adapter", ""),
        ("adapter", {}),
        ("adapter", {"name": "x", "colour": "red"}),
        ("adapter", []),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("functions", [{}]),
        ("guided_json", "no JSON"),
        ("guided_choice", []),
        ("guided_grammar", 5),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", {"chat_template": "x"}),
        ("use_beam_search", True),
        ("audio", {"voice": "x"}),
        ("truncate_prompt_tokens", 5),
        ("echo", True),
        ("add_special_tokens", True),
        ("documents", "text"),
        ("reasoning_effort", 5),
    ],
)
async def test_a_bad_value_in_a_chat_is_a_400_that_names_the_field(
    front: Front, field: str, value: object
) -> None:
    answer = await front.chat(**{field: value})
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert str(error["param"]).partition("[")[0].partition(".")[0] == field
    assert not front.engine.requests
    assert (await front.chat()).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [["a"]]),
        ("prompt", [1, "a"]),
        ("prompt", [-1]),
        ("prompt", [10**9]),
        ("prompt", 5),
        ("prompt", None),
        ("suffix", "x"),
        ("best_of", 0),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", "yes"),
        ("prompt_embeds", "AAAA"),
        ("truncate_prompt_tokens", -1),
    ],
)
async def test_a_bad_value_in_a_completion_is_a_400_that_names_the_field(
    front: Front, field: str, value: object
) -> None:
    answer = await front.complete(**{field: value})
    assert answer.status_code == 400, answer.text
    assert str(error_of(answer)["param"]).partition("[")[0] == field
    assert not front.engine.requests


async def test_fields_that_ask_for_nothing_are_taken(front: Front) -> None:
    asked = {"truncate_prompt_tokens": None, "documents": None, "reasoning_effort": None}
    assert (await front.chat(**asked, echo=False, add_special_tokens=False)).status_code == 200
    assert (await front.complete(**asked, add_special_tokens=True)).status_code == 200


@pytest.mark.parametrize("value", ["text", None])
async def test_harmless_values_of_unsupported_fields_pass(front: Front, value: str | None) -> None:
    format_ = value and {"type": value}
    answer = await front.chat(response_format=format_, tools=[], tool_choice="auto", functions=None)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"a": NaN}', b"\xff"])
async def test_a_body_that_is_no_json_object_is_a_400(front: Front, body: bytes) -> None:
    answer = await front.client.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/adapters/generate"]
)
async def test_what_a_web_page_can_send_unasked_is_a_415(
    front: Front, path: str, kind: str
) -> None:
    body = b'{"model": "base", "messages": [{"role": "user", "content": "hi"}]}'
    answer = await front.client.post(path, content=body, headers={"content-type": kind})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"
    assert not front.engine.requests


async def test_a_prompt_longer_than_the_context_is_a_400(front: Front) -> None:
    for fields in ({"messages": [{"role": "user", "content": "x" * 400}]}, {"max_tokens": 300}):
        answer = await front.chat(**fields)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"
        assert error_of(answer)["param"] == "messages"
    answer = await front.complete(prompt="x" * 400)
    assert error_of(answer)["param"] == "prompt"


async def test_unknown_fields_are_ignored_with_one_warning_each(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "loraplex_server"):
        for _ in range(3):
            assert (await front.chat(user="u", verbosity="low")).status_code == 200
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(messages) == [
        "ignoring unknown request field 'user'",
        "ignoring unknown request field 'verbosity'",
    ]


async def test_an_unknown_url_or_method_is_an_error_object(front: Front) -> None:
    answer = await front.client.get("/v1/nothing")
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "unknown_url"
    answer = await front.client.get("/v1/chat/completions")
    assert answer.status_code == 405
    error_of(answer)


async def test_a_body_over_the_limit_is_a_413_whether_declared_or_streamed(front: Front) -> None:
    limit = front.app.state.parts.config.http.max_body_bytes
    answer = await front.client.post("/v1/completions", content=b"x" * (limit + 1), headers=JSON)
    assert answer.status_code == 413
    error_of(answer)

    async def pieces():  # type: ignore[no-untyped-def]
        for _ in range(limit // 2**20 + 1):
            yield b"x" * 2**20

    answer = await front.client.post("/v1/completions", content=pieces(), headers=JSON)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"


@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
async def test_only_a_form_may_be_as_large_as_an_adapter(front: Front, kind: str) -> None:
    limit = front.app.state.parts.config.http.max_body_bytes
    body = b'{"source":"x","description":"' + b"x" * limit + b'"}'
    answer = await front.client.put("/v1/adapters/x", content=body, headers={"content-type": kind})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"
    files = {"config": b"{}", "weights": ("w", b"x" * (limit + 1))}
    answer = await front.client.put("/v1/adapters/x", files=files)
    assert answer.status_code == 400, answer.text


async def test_the_values_of_an_adapters_source_are_counted_before_they_are_parsed(
    front: Front,
) -> None:
    body = b'{"source":"x","examples":[' + b"{}," * MAX_VALUES + b"{}]}"
    answer = await front.client.put("/v1/adapters/x", content=body, headers=JSON)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "too_many_values"


async def test_a_template_that_fails_is_a_400(front: Front) -> None:
    front.app.state.parts.text._chat.chat_template, kept = (
        "{{ raise_exception('roles must alternate') }}",
        front.app.state.parts.text._chat.chat_template,
    )
    try:
        answer = await front.chat()
    finally:
        front.app.state.parts.text._chat.chat_template = kept
    assert answer.status_code == 400
    assert "roles must alternate" in str(error_of(answer)["message"])
    assert error_of(answer)["param"] == "messages"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
chat_fields = sorted({*ChatBody.model_fields, "tools", "response_format", "user"} - {"stream"})
completion_fields = sorted({*CompletionBody.model_fields, "best_of"} - {"stream"})


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_value_of_any_field_makes_the_server_fail(
    fuzz_front: Front, data: st.DataObject
) -> None:
    """Every answer is a 200 or an error object below 500, and nothing stays behind."""
    kind = data.draw(st.sampled_from(["chat", "completion"]))
    names = chat_fields if kind == "chat" else completion_fields
    fields = data.draw(st.dictionaries(st.sampled_from(names), json_values, min_size=1, max_size=3))
    fields.setdefault("max_tokens", 3)

    async def ask() -> httpx.Response:
        if kind == "chat":
            return await fuzz_front.chat(**fields)
        return await fuzz_front.complete(**fields)

    answer = asyncio.run(ask())
    assert answer.status_code in (200, 400, 404, 429), (fields, answer.text)
    if answer.status_code != 200:
        error_of(answer)
    assert fuzz_front.engine.n_running == 0
