"""Images of chats that were uploaded as files, through OpenAI's and Anthropic's clients."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from PIL import Image

from loraplex_server.settings.api_keys import parse_keys
from loraplex_server.settings.config import HttpConfig
from tests.conformance.tiny_base import app_of, tiny_engine_config
from tests.support.bases.tiny_vision import made_image, png, save_tiny_vision
from tests.support.servers.served_app import served_app

_SEES = "What is in the picture of the server that keeps one base model and many adapters?"
_KEYS = "".join(
    f'[[key]]\nname = "{tenant}"\nscope = "infer"\ntenant = "{tenant}"\n'
    f'sha256 = "{hashlib.sha256(tenant.encode()).hexdigest()}"\n'
    for tenant in ("acme", "umbra")
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("uploads")
    path = save_tiny_vision("llava", folder / "base")
    http = HttpConfig(
        served_model_names=("base",),
        max_image_bytes=20_000,
        max_image_pixels=10_000,
        api_keys=parse_keys(_KEYS),
    )
    with app_of(path, folder / "state", tiny_engine_config(), http) as app, served_app(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="acme", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def stranger(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="umbra", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url, api_key="acme", max_retries=0) as client:
        yield client


def _file(seed: int) -> tuple[str, bytes]:
    return f"{seed}.png", base64.b64decode(png(made_image(seed)))


def _uploaded(client: OpenAI, seed: int, purpose: Any = "vision") -> str:
    return client.files.create(file=_file(seed), purpose=purpose).id


def _named(file_id: object) -> dict[str, Any]:
    return {"type": "file", "file": {"file_id": file_id}}


def _sent(seed: int) -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{png(made_image(seed))}"},
    }


def _chat(*images: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": [*images, {"type": "text", "text": _SEES}]}]


def _ask(client: OpenAI, *images: dict[str, Any]) -> Any:
    return client.chat.completions.create(
        model="base",
        messages=_chat(*images),
        max_tokens=4,
        temperature=0,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )


def _logprobs(answer: Any) -> list[float]:
    return [token.logprob for token in answer.choices[0].logprobs.content]


@pytest.mark.parametrize("purpose", ["vision", "user_data"])
def test_an_uploaded_image_is_answered_as_a_data_url_of_it(client: OpenAI, purpose: str) -> None:
    one, other = _uploaded(client, 1, purpose), _uploaded(client, 2, purpose)
    named = _ask(client, _named(one), _named(other))
    sent = _ask(client, _sent(1), _sent(2))
    assert _logprobs(named) == pytest.approx(_logprobs(sent), abs=1e-4)
    assert named.choices[0].message.content == sent.choices[0].message.content
    assert sent.usage.prompt_tokens == named.usage.prompt_tokens
    # the same file has the same key in the prefix cache, however it was sent
    assert sent.usage.prompt_tokens_details.cached_tokens >= named.usage.prompt_tokens - 16
    swapped = _ask(client, _named(other), _sent(1))
    assert max(abs(a - b) for a, b in zip(_logprobs(swapped), _logprobs(sent), strict=True)) > 1e-3


def test_openais_responses_name_an_upload(client: OpenAI) -> None:
    content: list[Any] = [
        {"type": "input_image", "file_id": _uploaded(client, 3), "detail": "auto"},
        {"type": "input_text", "text": _SEES},
    ]
    answer = client.responses.create(
        model="base",
        input=[{"role": "user", "content": content}],
        max_output_tokens=4,
        temperature=0,
    )
    same = _ask(client, _sent(3))
    assert answer.output_text == same.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.input_tokens == same.usage.prompt_tokens


def test_anthropics_client_uploads_an_image_and_names_it(
    anthropic: Anthropic, client: OpenAI
) -> None:
    uploaded = anthropic.beta.files.upload(file=(*_file(4), "image/png"))
    assert (uploaded.mime_type, uploaded.size_bytes) == ("image/png", len(_file(4)[1]))
    source = {"type": "file", "file_id": uploaded.id}
    content: list[Any] = [{"type": "image", "source": source}, {"type": "text", "text": _SEES}]
    messages: list[Any] = [{"role": "user", "content": content}]
    answer = anthropic.messages.create(
        model="base", max_tokens=4, messages=messages, extra_body={"temperature": 0}
    )
    counted = anthropic.messages.count_tokens(model="base", messages=messages)
    same = _ask(client, _sent(4))
    assert answer.content[0].text == same.choices[0].message.content
    assert counted.input_tokens == same.usage.prompt_tokens


def test_anthropics_client_lists_reads_and_deletes_files(anthropic: Anthropic) -> None:
    files = [anthropic.beta.files.upload(file=_file(seed)) for seed in (5, 6, 7)]
    first = anthropic.beta.files.list(limit=2)
    assert [file.id for file in first.data] == [files[2].id, files[1].id]
    assert files[0].id in [file.id for file in anthropic.beta.files.list(limit=2)]  # all pages
    assert anthropic.beta.files.retrieve_metadata(files[0].id) == files[0]
    content = anthropic.beta.files.download(files[0].id)
    assert (content.read(), content.headers["content-type"]) == (_file(5)[1], "image/png")
    assert anthropic.beta.files.delete(files[0].id).type == "file_deleted"
    left = [file.id for file in anthropic.beta.files.list()]
    assert files[0].id not in left
    assert files[1].id in left


def test_vectors_and_token_counts_read_uploads(url: str, client: OpenAI) -> None:
    named, sent = _chat(_named(_uploaded(client, 8))), _chat(_sent(8))
    headers = {"authorization": "Bearer acme"}
    with httpx.Client(base_url=url, headers=headers) as http:
        counts = [http.post("/tokenize", json={"messages": chat}).json() for chat in (named, sent)]
        vectors = [
            http.post("/v1/embeddings", json={"model": "base", "messages": chat}).json()["data"][0]
            for chat in (named, sent)
        ]
    assert counts[0] == counts[1]
    assert vectors[0]["embedding"] == pytest.approx(vectors[1]["embedding"], abs=1e-5)


def test_a_line_of_a_batch_names_an_upload_of_its_tenant(client: OpenAI, stranger: OpenAI) -> None:
    def line(file_id: str) -> Any:
        body = {"model": "base", "messages": _chat(_named(file_id)), "max_tokens": 1}
        return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}

    image = _uploaded(client, 9)
    counts = []
    for each in (client, stranger):
        calls = each.files.create(
            file=("calls.jsonl", json.dumps(line(image)).encode()), purpose="batch"
        )
        batch = each.batches.create(
            input_file_id=calls.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        ended = each.batches.retrieve(batch.id, extra_query={"timeout_s": 60})
        assert ended.request_counts is not None
        counts.append((ended.request_counts.completed, ended.request_counts.failed))
    assert counts == [(1, 0), (0, 1)]


def test_an_upload_of_another_tenant_is_as_a_missing_one(client: OpenAI, stranger: OpenAI) -> None:
    image = _uploaded(client, 1)
    messages = []
    for file_id in (image, "file-none"):
        with pytest.raises(openai.NotFoundError) as missing:
            _ask(stranger, _sent(2), _named(file_id))
        assert missing.value.code == "file_not_found"
        assert missing.value.param == "messages[0].content[1].file.file_id"
        messages.append(missing.value.message.replace(file_id, "ID"))
    assert messages[0] == messages[1]
    client.files.delete(image)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        _ask(client, _named(image))


def _png(*size: int, noise: bool = False) -> bytes:
    file = io.BytesIO()
    image = Image.effect_noise((size[0], size[1]), 90) if noise else Image.new("L", size)
    image.save(file, "PNG")
    return file.getvalue()


_NO_IMAGES = {
    "a text": (b"hello", 400, "invalid_image", "no image"),
    "half a picture": (_file(1)[1][:200], 400, "invalid_image", "broken"),
    "a bomb": (_png(32_000, 400), 413, "image_too_large", "10,000"),
    "too many bytes": (_png(200, 200, noise=True), 413, "image_too_large", "20,000"),
}


@pytest.mark.parametrize("name", _NO_IMAGES)
@pytest.mark.parametrize("purpose", ["vision", "user_data"])
def test_a_file_that_is_no_image_is_not_stored(client: OpenAI, name: str, purpose: Any) -> None:
    data, status, code, told = _NO_IMAGES[name]
    before = [file.id for file in client.files.list()]
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("a.png", data), purpose=purpose)
    assert (refused.value.status_code, refused.value.code) == (status, code)
    assert told in refused.value.message
    assert [file.id for file in client.files.list()] == before


def test_a_file_of_calls_is_no_image(client: OpenAI) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    calls = client.files.create(file=("calls.jsonl", json.dumps(line).encode()), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="has the purpose batch; upload an image"):
        _ask(client, _named(calls.id))


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "file"}, "messages[0].content[0].file"),
        ({"type": "file", "file": {"file_data": "x"}}, "messages[0].content[0].file.file_id"),
        (_named(7), "messages[0].content[0].file.file_id"),
    ],
)
def test_a_part_that_names_no_file_is_refused_by_its_field(
    client: OpenAI, part: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(client, part)
    assert refused.value.param == param


@pytest.mark.parametrize("image", [{}, {"file_id": "file-1", "image_url": _sent(1)["image_url"]}])
def test_an_input_image_is_a_url_or_an_upload(client: OpenAI, image: dict[str, Any]) -> None:
    content: list[Any] = [{"type": "input_image", "detail": "auto", **image}]
    with pytest.raises(openai.BadRequestError, match="either an image_url or a file_id"):
        client.responses.create(model="base", input=[{"role": "user", "content": content}])
