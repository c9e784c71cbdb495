"""POST /v1/chat/completions without streaming."""

import asyncio

import pytest

from tests.server.conftest import Front
from tests.support.bases.tiny_tokenizer import EOS
from tests.support.servers.fake_engine import EOS_ID

pytestmark = pytest.mark.anyio
TEXT = "Hello, wörld! 😀 fine"


async def test_a_chat_is_answered_in_openai_shape(front: Front) -> None:
    answer = await front.chat()
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "base"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == TEXT
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None


async def test_usage_counts_prompt_output_and_cached_tokens(front: Front) -> None:
    front.engine.n_cached = 5
    usage = (await front.chat()).json()["usage"]
    request = front.engine.requests[0]
    n_output = len(front.engine.tokenizer.encode(TEXT, add_special_tokens=False).ids) + 1
    assert usage["prompt_tokens"] == len(request.prompt_ids)
    assert usage["completion_tokens"] == n_output  # the end token was generated too
    assert usage["total_tokens"] == usage["prompt_tokens"] + n_output
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}


async def test_cached_tokens_of_n_choices_are_those_of_the_first(front: Front) -> None:
    front.engine.manual = True
    asking = asyncio.create_task(front.chat(n=2, max_tokens=1))
    await front.engine.arrival(2)
    first, second = (request.request_id for request in front.engine.requests)
    front.engine.n_cached = 16
    front.engine.step(second)
    front.engine.n_cached = 0
    front.engine.step(first)
    usage = (await asking).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_the_prompt_is_the_rendered_template(front: Front) -> None:
    await front.chat(
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    )
    text = front.engine.tokenizer.decode(
        list(front.engine.requests[0].prompt_ids), skip_special_tokens=False
    )
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_content_parts_are_joined(front: Front) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await front.chat(messages=[{"role": "user", "content": parts}])
    await front.chat(messages=[{"role": "user", "content": "ab"}])
    first, second = front.engine.requests
    assert first.prompt_ids == second.prompt_ids


async def test_content_that_is_no_text_is_refused(front: Front) -> None:
    parts = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    answer = await front.chat(messages=[{"role": "user", "content": parts}])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0]"


async def test_a_final_message_can_be_continued(front: Front) -> None:
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Well"}]
    answer = await front.chat(messages=messages, continue_final_message=True)
    assert answer.status_code == 200, answer.text
    text = front.engine.tokenizer.decode(
        list(front.engine.requests[0].prompt_ids), skip_special_tokens=False
    )
    assert text.endswith("<|im_start|>assistant\nWell")


async def test_max_completion_tokens_wins_over_max_tokens(front: Front) -> None:
    answer = await front.chat(max_tokens=9, max_completion_tokens=3)
    assert front.engine.requests[0].sampling.max_tokens == 3
    assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_without_max_tokens_the_rest_of_the_context_may_be_used(front: Front) -> None:
    await front.chat(max_tokens=None)
    request = front.engine.requests[0]
    assert request.sampling.max_tokens == front.engine.max_model_len - len(request.prompt_ids)


async def test_sampling_fields_reach_the_engine(front: Front) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 42,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "min_tokens": 2,
        "max_tokens": 20,
        "ignore_eos": True,
    }
    answer = await front.chat(**fields, logit_bias={"5": -100}, stop_token_ids=[9])
    assert answer.status_code == 200, answer.text
    sampling = front.engine.requests[0].sampling
    for name, value in fields.items():
        assert getattr(sampling, name) == value, name
    assert dict(sampling.logit_bias) == {5: -100.0}
    assert sampling.stop_token_ids == {9}


async def test_n_choices_share_the_prompt_and_derive_their_seeds(front: Front) -> None:
    body = (await front.chat(n=3, seed=1)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    prompts = {request.prompt_ids for request in front.engine.requests}
    seeds = [request.sampling.seed for request in front.engine.requests]
    assert len(prompts) == 1
    assert seeds[0] == 1
    assert len(set(seeds)) == 3
    await front.chat(n=3, seed=1)
    assert [request.sampling.seed for request in front.engine.requests[3:]] == seeds
    assert body["usage"]["prompt_tokens"] == len(front.engine.requests[0].prompt_ids)


async def test_logprobs_come_with_bytes_that_rebuild_the_text(front: Front) -> None:
    body = (await front.chat(logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == TEXT + EOS
    assert len(content) == body["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert content[0]["logprob"] == -0.5


async def test_a_stop_string_ends_the_text_and_cancels_the_engine_request(front: Front) -> None:
    body = (await front.chat(stop=["wör", "never"])).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] == "Hello, "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "wör"
    assert front.engine.n_running == 0
    assert len(front.engine.cancelled) == 1


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("stop", [{"stop": "wörl"}, {"stop": ["never", "d! "]}, {}])
async def test_ids_log_probabilities_and_usage_count_the_same_tokens(
    front: Front, stop: dict[str, object], kept: bool
) -> None:
    """Whatever the text loses to a stop string, as in vLLM."""
    fields = {**stop, "include_stop_str_in_output": kept}
    fields |= {"logprobs": True, "return_token_ids": True}
    body = (await front.chat(**fields)).json()
    (choice,) = body["choices"]
    told, ids = choice["logprobs"]["content"], choice["token_ids"]
    assert len(told) == len(ids) == body["usage"]["completion_tokens"]
    known = [*front.engine.tokenizer.encode(TEXT).ids, EOS_ID]
    assert ids == known[: len(ids)]
    raw = b"".join(bytes(token["bytes"]) for token in told).decode()
    text = choice["message"]["content"]
    assert raw.startswith(text)
    *chunks, _ = await front.chat_events(**fields)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["delta"].get("content") or "" for part in parts) == text
    streamed = [
        entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]
    ]
    assert streamed == told
    assert [i for part in parts for i in part.get("token_ids", ())] == ids


async def test_a_stop_string_can_be_kept_in_the_output(front: Front) -> None:
    body = (await front.chat(stop="wör", include_stop_str_in_output=True)).json()
    assert body["choices"][0]["message"]["content"] == "Hello, wör"


async def test_stop_strings_do_not_count_within_min_tokens(front: Front) -> None:
    n_tokens = len(front.engine.tokenizer.encode("Hello, w", add_special_tokens=False).ids)
    body = (await front.chat(stop="ell", min_tokens=n_tokens)).json()
    assert body["choices"][0]["message"]["content"] == TEXT


async def test_a_stop_token_id_is_the_stop_reason(front: Front) -> None:
    token_id = front.engine.tokenizer.encode("!", add_special_tokens=False).ids[0]
    choice = (await front.chat(stop_token_ids=[token_id])).json()["choices"][0]
    assert choice["message"]["content"] == "Hello, wörld"
    assert choice["stop_reason"] == token_id
    assert choice["finish_reason"] == "stop"


async def test_a_stop_token_is_text_where_stop_strings_are(front: Front) -> None:
    """As in vLLM; one that is special is only shown where those are."""
    token_id = front.engine.tokenizer.encode("!", add_special_tokens=False).ids[0]
    fields = {"include_stop_str_in_output": True, "logprobs": True, "return_token_ids": True}
    body = (await front.chat(stop_token_ids=[token_id], **fields)).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "Hello, wörld!"
    assert (choice["stop_reason"], choice["finish_reason"]) == (token_id, "stop")
    n_tokens = body["usage"]["completion_tokens"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == n_tokens
    assert choice["token_ids"].count(token_id) == 1
    (choice,) = (await front.chat(**fields)).json()["choices"]
    assert choice["message"]["content"] == TEXT
    (choice,) = (await front.chat(skip_special_tokens=False, **fields)).json()["choices"]
    assert choice["message"]["content"] == TEXT + EOS
    assert choice["token_ids"][-1] == EOS_ID


async def test_token_ids_are_returned_on_request(front: Front) -> None:
    body = (await front.chat(return_token_ids=True)).json()
    prompt = list(front.engine.requests[0].prompt_ids)
    ids = [*front.engine.tokenizer.encode(TEXT).ids, EOS_ID]
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (prompt, ids)
    *chunks, _ = await front.chat_events(return_token_ids=True)
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", ())] == ids
    assert [c["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c] == [prompt]


async def test_tenant_and_salt_separate_the_prefix_cache(front: Front) -> None:
    await front.chat(cache_salt="a")
    await front.chat()
    first, second = front.engine.requests
    assert first.cache_salt != second.cache_salt
