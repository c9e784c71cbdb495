"""Kept responses: whose they are, how many, how long; and streams that fail."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.api.serving.responses.response_store import ResponseStore, StoredResponse
from loraplex_server.engine.errors import EngineDead
from loraplex_server.settings.api_keys import parse_keys
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio
CALL = {"model": "base", "input": "hi"}
KEY = '[[key]]\nname = "{0}"\ntenant = "{1}"\nsha256 = "{2}"\nscope = "infer"\n'


async def test_nobody_else_reads_continues_or_deletes_a_response(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    names = {"a1": "a", "a2": "a", "b1": "b"}
    keys = parse_keys(
        "".join(
            KEY.format(name, tenant, hashlib.sha256(name.encode()).hexdigest())
            for name, tenant in names.items()
        )
    )
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(api_keys=keys))
    as_key = {name: {"authorization": f"Bearer {name}"} for name in names}
    made = (await front.post("/v1/responses", CALL, **as_key["a1"])).json()
    path, go_on = f"/v1/responses/{made['id']}", {**CALL, "previous_response_id": made["id"]}
    theirs = await front.client.get(path, headers=as_key["b1"])
    assert theirs.status_code == 404
    assert theirs.json()["error"]["code"] == "response_not_found"
    assert (await front.client.delete(path, headers=as_key["b1"])).status_code == 404
    assert (await front.post("/v1/responses", go_on, **as_key["b1"])).status_code == 404
    kept = await front.client.get(path, headers=as_key["a2"])  # of the same tenant
    assert kept.json() == made
    assert (await front.post("/v1/responses", go_on, **as_key["a2"])).status_code == 200
    assert (await front.client.delete(path, headers=as_key["a2"])).json()["deleted"] is True
    assert (await front.client.get(path, headers=as_key["a1"])).status_code == 404
    front.store.close()


async def test_a_server_may_keep_none(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(response_store_bytes=0))
    made = (await front.post("/v1/responses", CALL)).json()
    assert made["store"] is False
    assert (await front.client.get(f"/v1/responses/{made['id']}")).status_code == 404
    refused = await front.post("/v1/responses", {**CALL, "store": True})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "store"
    front.store.close()


async def test_a_failure_in_the_stream_is_an_error_event_and_nothing_is_kept(front: Front) -> None:
    front.engine.manual = True
    async with front.call("/v1/responses", {**CALL, "stream": True}) as call:
        await front.engine.arrival()
        front.engine.step()
        first = await call.next_body()
        made = json.loads(first.split(b"\n")[1].removeprefix(b"data: "))["response"]["id"]
        front.engine.fail(EngineDead("out of memory"))
        name, data = (await call.rest()).decode().strip().split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["code"] == "engine_dead"
    assert told["sequence_number"] == first.count(b"event: ")
    assert (await front.client.get(f"/v1/responses/{made}")).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_the_work(front: Front, stream: bool) -> None:
    front.engine.manual = True
    async with front.call("/v1/responses", {**CALL, "stream": stream}) as call:
        await front.engine.arrival()
        await call.leave()
    assert front.engine.n_running == 0
    assert len(front.engine.cancelled) == 1


def test_the_store_is_bounded_and_the_largest_tenant_pays() -> None:
    now = 0.0
    store = ResponseStore(max_bytes=10_000, ttl_s=60, clock=lambda: now)
    small, large = StoredResponse(b"x" * 100, b"[]"), StoredResponse(b"x" * 1000, b"[]")
    store.store("quiet", "first", small)
    for number in range(50):
        store.store("loud", f"r{number}", large)
        assert store.n_bytes <= 10_000
    assert store.get("quiet", "first") == small
    assert store.get("loud", "r0") is None
    assert store.get("loud", "r49") == large
    assert store.get("quiet", "r49") is None
    store.store("loud", "huge", StoredResponse(b"x" * 20_000, b"[]"))
    assert store.get("loud", "huge") is None
    now = 61.0
    assert store.get("quiet", "first") is None
    assert not store.delete("quiet", "first")
    store.store("quiet", "second", small)
    assert store.n_bytes == small.n_bytes
    assert store.delete("quiet", "second")
    assert store.n_bytes == 0


async def test_streamed_log_probabilities_are_those_of_the_whole_answer(front: Front) -> None:
    body = {**CALL, "top_logprobs": 1}
    whole = (await front.post("/v1/responses", body)).json()
    told = whole["output"][0]["content"][0]["logprobs"]
    assert len(told) == whole["usage"]["output_tokens"]  # the end token is one
    stream = (await front.post("/v1/responses", {**body, "stream": True})).text
    events = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: ")]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == told
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == told
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == told
