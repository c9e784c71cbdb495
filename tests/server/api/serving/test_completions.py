"""POST /v1/completions: every form of prompt, echo, logprobs."""

import pytest

from tests.server.conftest import Front
from tests.support.bases.tiny_tokenizer import EOS

pytestmark = pytest.mark.anyio
TEXT = "Hello, wörld! 😀 fine"


async def test_a_string_is_completed(front: Front) -> None:
    body = (await front.complete()).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"][0]["text"] == TEXT
    assert body["choices"][0]["finish_reason"] == "stop"
    assert "message" not in body["choices"][0]


async def test_a_list_of_strings_gives_n_choices_for_each_in_order(front: Front) -> None:
    front.engine.answer = lambda request: request.prompt_ids
    body = (await front.complete(prompt=["one", "two"], n=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["one", "one", "two", "two"]
    ids = {request.prompt_ids for request in front.engine.requests}
    assert body["usage"]["prompt_tokens"] == sum(len(prompt) for prompt in ids)


async def test_each_prompt_of_a_list_gets_the_seeds_it_would_get_alone(front: Front) -> None:
    await front.complete(prompt=["one", "two"], n=2, seed=5)
    seeds = [request.sampling.seed for request in front.engine.requests]
    assert seeds[:2] == seeds[2:]


@pytest.mark.parametrize("nested", [False, True])
async def test_token_ids_are_taken_as_they_are(front: Front, nested: bool) -> None:
    ids = [5, 6, 7]
    answer = await front.complete(prompt=[ids] if nested else ids)
    assert answer.status_code == 200
    assert front.engine.requests[0].prompt_ids == (5, 6, 7)


async def test_echo_repeats_the_prompt_before_the_answer(front: Front) -> None:
    body = (await front.complete(prompt="Grüße: ", echo=True)).json()
    assert body["choices"][0]["text"] == "Grüße: " + TEXT
    *chunks, _ = await front.completion_events(prompt="Grüße: ", echo=True, n=2)
    for index in range(2):
        mine = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(mine) == "Grüße: " + TEXT


async def test_logprobs_are_parallel_lists_with_offsets_into_the_text(front: Front) -> None:
    choice = (await front.complete(logprobs=2)).json()["choices"][0]
    logprobs = choice["logprobs"]
    n_tokens = len(front.engine.tokenizer.encode(TEXT).ids)
    assert {len(values) for values in logprobs.values()} == {n_tokens + 1}  # and the end token
    assert (logprobs["tokens"].pop(), logprobs["text_offset"].pop()) == (EOS, len(TEXT))
    assert EOS in logprobs["top_logprobs"].pop()
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(logprob == -0.5 for logprob in logprobs["token_logprobs"])
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert token in top
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][start:].startswith(token)


async def test_a_prompt_is_scored_with_echo_and_no_new_tokens(front: Front) -> None:
    body = (await front.complete(prompt="score me", echo=True, logprobs=1, max_tokens=0)).json()
    choice = body["choices"][0]
    assert choice["text"] == "score me"
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    n_prompt = len(front.engine.requests[0].prompt_ids)
    assert {len(values) for values in logprobs.values()} == {n_prompt}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value == -0.5 for value in logprobs["token_logprobs"][1:])
    assert front.engine.requests[0].sampling.prompt_logprobs == 1


async def test_echo_with_logprobs_covers_prompt_and_answer(front: Front) -> None:
    fields = {"prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 4}
    whole = (await front.complete(**fields)).json()["choices"][0]
    n_prompt = len(front.engine.requests[0].prompt_ids)
    assert len(whole["logprobs"]["tokens"]) == n_prompt + 4
    assert whole["logprobs"]["text_offset"][n_prompt] == len("abc")
    *chunks, _ = await front.completion_events(**fields)
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [x for c in chunks for x in c["choices"][0]["logprobs"][name]]
        assert joined == whole["logprobs"][name]


async def test_stop_strings_do_not_look_at_the_echoed_prompt(front: Front) -> None:
    choice = (await front.complete(prompt="a stop b", echo=True, stop="stop")).json()["choices"][0]
    assert choice["text"] == "a stop b" + TEXT


async def test_tokenize_and_detokenize_are_inverse(front: Front) -> None:
    answer = await front.post("/tokenize", {"prompt": "Grüße 😀", "return_token_strs": True})
    body = answer.json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == front.engine.max_model_len
    answer = await front.post("/detokenize", {"tokens": body["tokens"]})
    assert answer.json() == {"prompt": "Grüße 😀"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
async def test_bad_tokenisation_requests_are_a_400(front: Front, path: str, body: object) -> None:
    answer = await front.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]
