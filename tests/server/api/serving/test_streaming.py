"""Server-sent events, exactly as clients parse them."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.errors import EngineDead, EngineDraining
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.servers.asgi_call import events_of

pytestmark = pytest.mark.anyio
TEXT = "Hello, wörld! 😀 fine"
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def test_headers_keep_proxies_from_buffering(front: Front) -> None:
    answer = await front.chat(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_a_stream_is_role_text_finish_done(front: Front) -> None:
    *chunks, done = await front.chat_events()
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["choices"][0]["finish_reason"] is None
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == TEXT
    assert "\ufffd" not in "".join(str(chunk) for chunk in chunks)


async def test_every_chunk_repeats_id_created_model_and_object(front: Front) -> None:
    *chunks, _ = await front.chat_events()
    heads = {(c["id"], c["created"], c["model"], c["object"]) for c in chunks}
    assert len(heads) == 1
    assert heads.pop()[3] == "chat.completion.chunk"


async def test_each_event_is_one_data_line_and_a_blank_line(front: Front) -> None:
    raw = (await front.chat(stream=True)).content
    blocks = raw.split(b"\n\n")
    assert blocks[-1] == b""
    assert blocks[-2] == b"data: [DONE]"
    assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks[:-2])


async def test_the_role_chunk_comes_with_the_first_token_and_not_before(front: Front) -> None:
    front.engine.manual = True
    async with front.call("/v1/chat/completions", CHAT) as call:
        await front.engine.arrival()
        assert call.n_messages == 0
        front.engine.step()
        first = events_of(await call.next_body())
        assert first[0]["choices"][0]["delta"]["role"] == "assistant"
        assert call.status == 200


async def test_usage_comes_last_with_empty_choices_and_only_if_asked_for(front: Front) -> None:
    chunks = await front.chat_events()
    assert all(chunk == "[DONE]" or (chunk["choices"] and "usage" not in chunk) for chunk in chunks)
    *chunks, usage, done = await front.chat_events(stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)


async def test_continuous_usage_grows_with_every_chunk(front: Front) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = await front.chat_events(stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert last["usage"]["completion_tokens"] == counts[-1]


async def test_first_chunks_of_n_choices_come_in_index_order(front: Front) -> None:
    front.engine.manual = True
    async with front.call("/v1/chat/completions", {**CHAT, "n": 3, "max_tokens": 2}) as call:
        await front.engine.arrival(3)
        ids = [request.request_id for request in front.engine.requests]
        front.engine.step(ids[2])
        front.engine.step(ids[1])
        front.engine.step(ids[1])
        front.engine.step(ids[0])
        front.engine.step(ids[0])
        front.engine.step(ids[2])
        chunks = events_of(await call.rest())[:-1]
    first_seen = list(dict.fromkeys(chunk["choices"][0]["index"] for chunk in chunks))
    assert first_seen == [0, 1, 2]
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[-1]["finish_reason"] == "length"


async def test_a_stop_string_is_never_shown_in_part(front: Front) -> None:
    *chunks, _ = await front.chat_events(stop="wörld")
    text = ""
    for chunk in chunks:
        text += chunk["choices"][0]["delta"].get("content", "")
        assert "w" not in text
    assert text == "Hello, "
    assert chunks[-1]["choices"][0]["stop_reason"] == "wörld"


@pytest.mark.parametrize("stop", ["fi", None])
async def test_streamed_logprobs_are_those_of_the_whole_answer(
    front: Front, stop: str | None
) -> None:
    whole = (await front.chat(logprobs=True, top_logprobs=1, stop=stop)).json()["choices"][0]
    *chunks, _ = await front.chat_events(logprobs=True, top_logprobs=1, stop=stop)
    streamed = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == whole["logprobs"]["content"]


async def test_an_error_before_the_first_token_has_its_own_status(front: Front) -> None:
    front.engine.manual = True
    async with front.call("/v1/chat/completions", CHAT) as call:
        await front.engine.arrival()
        front.engine.fail(EngineDead("out of memory"))
        body = await call.next_body()
    assert call.status == 503
    assert b"out of memory" in body


async def test_an_error_in_the_stream_is_an_event_and_then_done(front: Front) -> None:
    front.engine.manual = True
    async with front.call("/v1/chat/completions", CHAT) as call:
        await front.engine.arrival()
        front.engine.step()
        await call.next_body()
        front.engine.fail(EngineDraining("the server went down"))
        error, done = events_of(await call.rest())
    assert done == "[DONE]"
    assert error["error"]["message"] == "the server went down"
    assert error["error"]["code"] == "server_draining"
    assert set(error["error"]) == {"message", "type", "param", "code"}


async def test_pings_keep_a_silent_stream_open(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(ping_interval_s=0.01))
    front.engine.manual = True
    async with front.call("/v1/chat/completions", CHAT) as call:
        assert await call.next_body() == b": ping\n\n"
        assert call.status == 200
        for _ in range(3):
            front.engine.step()
        while (body := await call.next_body()) == b": ping\n\n":
            pass
        assert events_of(body)[0]["choices"][0]["delta"]["role"] == "assistant"
    front.store.close()


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_engine_requests(
    front: Front, spec_version: str, stream: bool
) -> None:
    front.engine.manual = True
    body = {**CHAT, "stream": stream, "n": 2}
    async with front.call("/v1/chat/completions", body, spec_version=spec_version) as call:
        await front.engine.arrival(2)
        if stream:
            front.engine.step()
            await call.next_body()
        await call.leave()
        assert call.ended
    assert front.engine.n_running == 0
    assert len(front.engine.cancelled) == 2
    assert len(front.app.state.parts.live) == 0


async def test_a_completion_stream_has_text_chunks_and_no_role(front: Front) -> None:
    *chunks, done = await front.completion_events()
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("delta" not in chunk["choices"][0] for chunk in chunks)


async def test_an_answer_without_any_token_still_has_role_and_finish(front: Front) -> None:
    front.engine.answer = lambda request: []
    role, final, done = await front.chat_events()
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert final["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"
