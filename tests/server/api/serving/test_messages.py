"""/v1/messages over a scripted engine: what its streams say when things go wrong, and who pays."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.errors import EngineDead
from loraplex_server.settings.api_keys import parse_keys
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio
TURNS = [{"role": "user", "content": "hi"}]
CALL = {"model": "base", "messages": TURNS, "max_tokens": 50}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
SECRET = "key-of-the-messages"
KEYS = """
[[key]]
name = "one"
sha256 = "{}"
scope = "infer"
requests_per_minute = 1
"""


async def test_an_error_in_the_stream_is_an_error_event(front: Front) -> None:
    front.engine.manual = True
    async with front.call("/v1/messages", {**CALL, "stream": True}) as call:
        await front.engine.arrival()
        front.engine.step()
        assert (await call.next_body()).startswith(b"event: message_start\n")
        front.engine.fail(EngineDead("out of memory"))
        name, data = (await call.rest()).decode().strip().split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["type"] == "error"
    assert told["error"]["type"] == "overloaded_error"
    assert "out of memory" in told["error"]["message"]


async def test_a_silent_stream_has_ping_events(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(ping_interval_s=0.01))
    front.engine.manual = True
    async with front.call("/v1/messages", {**CALL, "stream": True}) as call:
        assert await call.next_body() == b'event: ping\ndata: {"type":"ping"}\n\n'
    front.store.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_the_work(front: Front, stream: bool) -> None:
    front.engine.manual = True
    async with front.call("/v1/messages", {**CALL, "stream": stream}) as call:
        await front.engine.arrival()
        await call.leave()
    assert front.engine.n_running == 0
    assert len(front.engine.cancelled) == 1


async def test_an_answer_without_text_has_no_blocks(front: Front) -> None:
    front.engine.answer = ""
    answer = (await front.post("/v1/messages", CALL)).json()
    assert answer["content"] == []
    assert answer["stop_reason"] == "end_turn"
    stream = (await front.post("/v1/messages", {**CALL, "stream": True})).text
    events = [line[7:] for line in stream.split("\n") if line.startswith("event: ")]
    assert events == ["message_start", "message_delta", "message_stop"]


async def test_what_the_prefix_cache_had_is_told_apart(front: Front) -> None:
    front.engine.n_cached = 5
    usage = (await front.post("/v1/messages", CALL)).json()["usage"]
    assert usage["cache_read_input_tokens"] == 5
    counted = (await front.post("/v1/messages/count_tokens", {"messages": TURNS})).json()
    assert usage["input_tokens"] + 5 == counted["input_tokens"]


async def test_limits_of_a_key_hold_and_are_told_in_anthropics_form(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    keys = parse_keys(KEYS.format(hashlib.sha256(SECRET.encode()).hexdigest()))
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(api_keys=keys))
    front.headers = {"x-api-key": SECRET}
    first = await front.post("/v1/messages", CALL)
    assert first.status_code == 200, first.text
    refused = await front.post("/v1/messages", CALL)
    assert refused.status_code == 429
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "retry-after" in refused.headers
    front.store.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"max_tokens": 100_000}, "messages"),
        ({"messages": [{"role": "user", "content": [RESULT] * 4097}]}, "messages"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    front: Front, fields: dict[str, object], param: str
) -> None:
    answer = await front.post("/v1/messages", {**CALL, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


async def test_another_method_is_refused_in_the_same_form(front: Front) -> None:
    refused = await front.client.get("/v1/messages")
    assert refused.status_code == 405
    assert refused.json()["type"] == "error"
