"""The official openai client against a real server process with a real engine and adapters."""

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, CompletionChoice

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import ServerProcess

from .conftest import ADAPTERS, ADMIN, INFER

MESSAGES = [{"role": "user", "content": "Grüße 😀"}]


def text_of(client: OpenAI, **fields: object) -> str:
    answer = client.chat.completions.create(
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | fields
    )
    return str(answer.choices[0].message.content)


def metric(server: ServerProcess, client: OpenAI, name: str) -> float:
    headers = {"Authorization": f"Bearer {ADMIN}"}  # what all tenants do is not for every key
    text = client._client.get(f"{server.url}/metrics", headers=headers).text
    values = [float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(name)]
    assert values, name
    return sum(values)  # of a cluster each process has its own


def test_models_are_listed_base_first_and_shown_one_by_one(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [
        *("tiny", "all-minilm-l6-v2"),
        *("one", "org/three", "two"),
    ]
    assert client.models.retrieve("org/three").id == "org/three"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("four")


def test_a_name_that_is_none_is_answered_by_what_was_meant(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="available: tiny, all-minilm-l6-v2"):
        client.embeddings.create(model="text-embedding-3-small", input="hello")
    with pytest.raises(openai.NotFoundError, match="closest registered: two"):
        client.chat.completions.create(model="TWO", messages=MESSAGES)


def test_a_chat_is_answered_and_counted(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=9, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9


def test_a_request_waits_once_whatever_the_length_of_its_answer(
    server: ServerProcess, client: OpenAI
) -> None:
    names = ("vllm:request_queue_time_seconds_count", "loraplex_adapter_queue_seconds_count")
    text_of(client)
    before = [metric(server, client, name) for name in names]
    text_of(client, max_tokens=24)
    assert [metric(server, client, name) for name in names] == [n + 1 for n in before]


def test_a_stream_gives_the_same_text_as_the_whole_answer(client: OpenAI) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **fields
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_each_adapter_answers_with_its_own_voice_however_it_is_named(client: OpenAI) -> None:
    base = text_of(client)
    for name in ADAPTERS:
        own = text_of(client, extra_body={"adapter": name})
        assert own != base
        assert text_of(client, model=name) == own
        assert text_of(client, model=f"tiny:{name}") == own
        assert text_of(client, extra_body={"adapter_id": name}) == own
        mixed = [{"name": name, "weight": 1.0}]
        assert text_of(client, extra_body={"adapter": mixed}) == own
    half = [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 0.5}]
    assert text_of(client, extra_body={"adapter": half})


def test_mixed_concurrent_requests_answer_as_if_alone(
    server: ServerProcess, client: OpenAI
) -> None:
    names = [None, *ADAPTERS] * 4
    alone = {name: text_of(client, extra_body={"adapter": name}) for name in [None, *ADAPTERS]}

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=INFER) as many:
            answers = await asyncio.gather(
                *(
                    many.chat.completions.create(
                        model="tiny",
                        messages=MESSAGES,
                        max_tokens=12,
                        temperature=0,
                        extra_body={"adapter": name},
                    )
                    for name in names
                )
            )
        return [str(answer.choices[0].message.content) for answer in answers]

    assert asyncio.run(ask_all()) == [alone[name] for name in names]


def test_headers_name_request_and_adapter(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="one", messages=MESSAGES, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-loraplex-adapter"].startswith("one@")
    assert raw.parse()._request_id == "mine-1"


def test_n_choices_differ_and_repeat_with_the_seed(client: OpenAI) -> None:
    fields = {"model": "tiny", "messages": MESSAGES, "n": 3, "seed": 7, "max_tokens": 8}
    first, second = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in second.choices] == texts
    with (
        client.chat.completions.stream(**fields) as stream,
        pytest.raises(openai.LengthFinishReasonError) as ended,  # how the client tells "length"
    ):
        stream.get_final_completion()
    assert [choice.message.content for choice in ended.value.completion.choices] == texts


def test_logprobs_are_those_of_the_chosen_tokens(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="one", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy
    raw = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content


def test_a_stop_string_cuts_the_answer_streamed_or_not(client: OpenAI) -> None:
    whole = text_of(client, max_tokens=40)
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    answer = client.chat.completions.create(stop=stop, **fields)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(stop=[stop], stream=True, **fields)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_completions_take_texts_and_token_ids(client: OpenAI) -> None:
    fields = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    several = client.completions.create(prompt=["one base", "many adapters"], **fields)
    one = client.completions.create(prompt="many adapters", **fields)
    assert several.choices[1].text == one.choices[0].text
    tokens = client._client.post(
        client.base_url.join("/tokenize"),
        json={"prompt": "many adapters"},
        headers=client.auth_headers,
    ).json()["tokens"]
    by_ids = client.completions.create(prompt=tokens, **fields)
    assert by_ids.choices[0].text == one.choices[0].text


def test_the_best_of_several_are_those_with_the_highest_mean_logprob(client: OpenAI) -> None:
    call = {"model": "tiny", "prompt": ["Grüße", "a b"], "temperature": 1.5, "max_tokens": 9}
    every = client.completions.create(n=5, logprobs=0, seed=7, **call)
    best = client.completions.create(n=2, best_of=5, seed=7, **call)
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    for prompt in (0, 1):
        choices = every.choices[5 * prompt : 5 * prompt + 5]
        ranked = sorted(choices, key=_mean_logprob, reverse=True)
        answered = best.choices[2 * prompt : 2 * prompt + 2]
        assert [choice.text for choice in answered] == [choice.text for choice in ranked[:2]]
    assert best.usage is not None
    assert every.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens  # all were made
    for wrong in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}):
        with pytest.raises(openai.BadRequestError, match="best_of"):
            client.completions.create(**call, **wrong)


def _mean_logprob(choice: CompletionChoice) -> float:
    assert choice.logprobs is not None
    found = choice.logprobs.token_logprobs
    assert found
    return sum(value or 0.0 for value in found) / len(found)


def test_only_allowed_tokens_are_drawn(client: OpenAI) -> None:
    allowed = [17, 40, 41, 99, 200]
    body = {"allowed_token_ids": allowed, "ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(
        model="two", prompt="x", temperature=2, max_tokens=60, seed=1, extra_body=body
    )
    assert set(_token_ids(answer)) == set(allowed)
    with pytest.raises(openai.BadRequestError, match="allowed_token_ids"):
        client.completions.create(
            model="tiny", prompt="x", extra_body={**body, "guided_choice": ["a", "b"]}
        )


def test_a_bad_word_is_forbidden_where_its_other_tokens_precede_its_last(
    server: ServerProcess, client: OpenAI
) -> None:
    def ask(path: str, body: dict[str, object]) -> dict[str, Any]:
        answer = client._client.post(f"{server.url}{path}", json=body, headers=client.auth_headers)
        return dict(answer.json())

    call = {"model": "tiny", "prompt": "x", "temperature": 1.5, "max_tokens": 40, "seed": 4}
    shown = {"return_token_ids": True, "ignore_eos": True}
    ids = _token_ids(client.completions.create(**call, extra_body=shown))
    words = {
        (first, second): ask("/detokenize", {"tokens": [first, second]})["prompt"]
        for first, second in itertools.pairwise(ids)
    }
    pair, word = next(
        (pair, word)
        for pair, word in words.items()
        if word == word.lstrip()
        and ask("/tokenize", {"prompt": word, "add_special_tokens": False})["tokens"] == [*pair]
    )
    body = {**shown, "bad_words": [word]}
    kept = _token_ids(client.completions.create(**call, extra_body=body))
    at = list(itertools.pairwise(ids)).index(pair)
    assert kept[: at + 1] == ids[: at + 1]  # its first token may stand
    assert kept[at + 1] != pair[1]
    assert pair not in itertools.pairwise(kept)


def _token_ids(answer: Completion) -> list[int]:
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


def test_a_prompt_is_scored_as_lm_eval_does_it(client: OpenAI) -> None:
    first = client.completions.create(
        model="one", prompt="many", max_tokens=4, temperature=0, logprobs=1
    )
    text = "many" + first.choices[0].text
    scored = client.completions.create(
        model="one", prompt=text, max_tokens=0, echo=True, logprobs=1
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert scored.choices[0].text == text


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        (
            {"extra_body": {"adapter": "nobody"}},
            openai.NotFoundError,
            "adapter",
            "adapter_not_found",
        ),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"max_tokens": 9999}, openai.BadRequestError, "messages", "context_length_exceeded"),
        (
            {"functions": [{"name": "f"}]},
            openai.BadRequestError,
            "functions",
            "unsupported_parameter",
        ),
    ],
)
def test_errors_reach_the_client_with_their_class_param_and_code(
    client: OpenAI,
    fields: dict[str, object],
    error: type[openai.APIStatusError],
    param: str,
    code: str,
) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.chat.completions.create(
                **{"model": "tiny", "messages": MESSAGES, "stream": stream} | fields
            )
        assert caught.value.param == param
        assert caught.value.code == code


def test_keys_are_asked_for_and_scopes_are_kept(server: ServerProcess, client: OpenAI) -> None:
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key-1", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.delete("/adapters/one", cast_to=object)


def test_an_adapter_comes_and_goes_while_the_server_runs(
    server: ServerProcess, client: OpenAI, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "new", BaseSpec.of(tiny_model(), "tiny"), seed=9, scale=0.4)
    url, headers = f"{server.url}/v1/adapters/new", {"authorization": f"Bearer {ADMIN}"}
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    http = client._client
    answer = http.put(url, files={k: (k, v) for k, v in files.items()}, headers=headers)
    assert answer.status_code == 201, answer.text
    assert text_of(client, model="new") != text_of(client)
    assert http.post(f"{url}/pin", headers=headers).json()["tier"] == "device"
    assert http.post(f"{url}/unpin", headers=headers).status_code == 200
    assert http.post(f"{url}/unload", headers=headers).json()["tier"] == "disk"
    assert text_of(client, model="new") != text_of(client)
    report = http.delete(url, headers=headers).json()
    assert report["drained"]
    assert all(n_bytes > 0 for n_bytes in report["n_bytes_freed"].values()), report
    with pytest.raises(openai.NotFoundError):
        text_of(client, model="new")


def test_a_name_uploaded_again_under_load_answers_wholly_old_or_wholly_new(
    server: ServerProcess, client: OpenAI, tmp_path: Path
) -> None:
    spec = BaseSpec.of(tiny_model(), "tiny")
    url, headers = f"{server.url}/v1/adapters/swapped", {"authorization": f"Bearer {ADMIN}"}
    revisions = []
    for seed in (21, 22):
        folder = write_lora(tmp_path / str(seed), spec, seed=seed, scale=0.4)
        files = [
            (part, (part, (folder / name).read_bytes()))
            for part, name in (
                ("config", "adapter_config.json"),
                ("weights", "adapter_model.safetensors"),
            )
        ]
        revisions.append(files)
    own_text: dict[str, str] = {}  # digest → greedy text
    for files in revisions:
        digest = client._client.put(url, files=files, headers=headers).json()["digest"]
        own_text[digest] = text_of(client, model="swapped", max_tokens=32)
    assert len(set(own_text.values())) == 2

    async def ask(many: AsyncOpenAI) -> tuple[str, str]:
        answer = await many.chat.completions.create(
            model="swapped", messages=MESSAGES, max_tokens=32, temperature=0
        )
        return answer.adapter["digest"], str(answer.choices[0].message.content)

    async def load_and_swap() -> list[tuple[str, str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=INFER) as many:
            asking = [asyncio.create_task(ask(many)) for _ in range(8)]
            for turn in range(10):
                await many._client.put(url, files=revisions[turn % 2], headers=headers)
                asking += [asyncio.create_task(ask(many)) for _ in range(4)]
            return await asyncio.gather(*asking)

    answers = asyncio.run(load_and_swap())
    assert {digest for digest, _ in answers} == set(own_text)
    assert all(text == own_text[digest] for digest, text in answers)


def test_clients_that_leave_free_the_engine(server: ServerProcess, client: OpenAI) -> None:
    aborted = 'vllm:request_success_total{engine="0",finished_reason="abort"'
    before = metric(server, client, aborted)
    fields = {"model": "one", "messages": MESSAGES, "max_tokens": 3000}
    stream = client.chat.completions.create(
        stream=True, n=4, extra_body={"ignore_eos": True}, **fields
    )
    next(iter(stream))
    stream.close()
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(n=8, extra_body={"ignore_eos": True}, **fields)
    deadline = time.monotonic() + 60
    found = None
    while found != (0, 12) and time.monotonic() < deadline:
        n_aborted = metric(server, client, aborted) - before
        found = (metric(server, client, "vllm:num_requests_running"), n_aborted)
    assert found == (0, 12)
    assert text_of(client)
