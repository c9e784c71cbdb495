"""Images of chats through OpenAI's and Anthropic's clients, the prefix cache, and refusals."""

import base64
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from anthropic import Anthropic
from openai import OpenAI
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText

from loraplex_adapter_store.sources.prefix import SourcePrefix
from loraplex_server.settings.config import HttpConfig
from tests.conformance.base_rows import BASE_ROWS
from tests.conformance.oracle import make_peft
from tests.conformance.peft_row import PeftRow, moved
from tests.conformance.tiny_base import app_of, save_base, tiny_engine_config
from tests.support.bases.tiny_vision import (
    IMAGE_ID,
    made_image,
    png,
    processor_of,
    save_tiny_vision,
)
from tests.support.servers.served_app import served_app
from tests.support.servers.web_folder import WebFolder, web_folder

_SEES = "What is in the picture of the server that keeps one base model and many adapters?"
_BEGUN = {"role": "assistant", "content": "It shows"}
_HTTP = HttpConfig(
    served_model_names=("base",), max_images=3, max_image_bytes=20_000, max_image_pixels=10_000
)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebFolder]:
    folder = tmp_path_factory.mktemp("web")
    (folder / "shown").mkdir()
    made_image(3).save(folder / "shown/a.png")
    (folder / "shown/large.bmp").write_bytes(b"BM" + bytes(20_001))
    with web_folder(folder) as server:
        yield server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, web: WebFolder) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("images")
    path = save_tiny_vision("llava", folder / "base")
    http = _HTTP.model_copy(update={"allow_image_urls": (SourcePrefix.parse(f"{web.url}/shown"),)})
    with app_of(path, folder / "state", tiny_engine_config(), http) as app, served_app(app) as url:
        yield url


@pytest.fixture(scope="module")
def openai(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{png(image)}"


def _user(*contents: str | Image.Image) -> list[Any]:
    """Return a chat of one turn with texts and images."""
    parts = [
        {"type": "text", "text": content}
        if isinstance(content, str)
        else {"type": "image_url", "image_url": {"url": _data_url(content), "detail": "low"}}
        for content in contents
    ]
    return [{"role": "user", "content": parts}]


def _ask(client: OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(
        model="base", messages=messages, max_tokens=4, temperature=0, seed=0, **options
    )


def test_streamed_and_whole_answers_to_an_image_are_the_same(openai: OpenAI) -> None:
    messages = _user(made_image(3), _SEES)
    whole = _ask(openai, messages)
    chunks = _ask(openai, messages, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content
    text_alone = _ask(openai, _user(_SEES))
    assert whole.usage.prompt_tokens > text_alone.usage.prompt_tokens + 16  # of the image


def test_another_image_of_the_same_size_never_hits_the_prefix_cache(openai: OpenAI) -> None:
    def n_cached(seed: int) -> int:
        usage = _ask(openai, _user(_SEES, made_image(seed), _SEES)).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    n_tokens = _ask(openai, _user(_SEES, made_image(11), _SEES)).usage.prompt_tokens
    assert n_cached(11) >= n_tokens - 16  # all but the last page
    before = _ask(openai, _user(_SEES)).usage.prompt_tokens
    assert 0 < n_cached(12) <= before  # the text before the image alone
    assert n_cached(12) >= n_tokens - 16


def test_anthropics_client_sends_an_image_beside_text(url: str, openai: OpenAI) -> None:
    image = made_image(4)
    source = {"type": "base64", "media_type": "image/png", "data": png(image)}
    content: list[Any] = [{"type": "image", "source": source}, {"type": "text", "text": _SEES}]
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": content}]
        answer = client.messages.create(
            model="base", max_tokens=4, messages=messages, extra_body={"temperature": 0}
        )
        counted = client.messages.count_tokens(model="base", messages=messages)
    same = _ask(openai, _user(image, _SEES))
    assert answer.content[0].text == same.choices[0].message.content
    assert counted.input_tokens == same.usage.prompt_tokens


def test_a_tools_result_may_have_images(url: str, openai: OpenAI) -> None:
    image, call = made_image(8), {"id": "c1", "name": "screen"}
    source = {"type": "base64", "media_type": "image/png", "data": png(image)}
    result = [{"type": "text", "text": "Now:"}, {"type": "image", "source": source}]
    turns: list[Any] = [
        {"role": "user", "content": _SEES},
        {"role": "assistant", "content": [{"type": "tool_use", "input": {}, **call}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c1", "content": result}],
        },
    ]
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(
            model="base", max_tokens=4, messages=turns, extra_body={"temperature": 0}
        )
    function = {"name": "screen", "arguments": "{}"}
    same = _ask(
        openai,
        [
            turns[0],
            {
                "role": "assistant",
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": _user("Now:", image)[0]["content"]},
        ],
    )
    assert answer.content[0].text == same.choices[0].message.content
    assert answer.usage.input_tokens == same.usage.prompt_tokens
    shown = httpx.post(f"{url}/v1/messages/count_tokens", json={"model": "base", "messages": turns})
    del result[1]
    less = httpx.post(f"{url}/v1/messages/count_tokens", json={"model": "base", "messages": turns})
    assert shown.json()["input_tokens"] >= less.json()["input_tokens"] + 16  # of the image


def test_the_responses_api_takes_input_images(openai: OpenAI) -> None:
    image = made_image(5)
    content: list[Any] = [
        {"type": "input_image", "image_url": _data_url(image), "detail": "auto"},
        {"type": "input_text", "text": _SEES},
    ]
    answer = openai.responses.create(
        model="base",
        input=[{"role": "user", "content": content}],
        max_output_tokens=4,
        temperature=0,
    )
    same = _ask(openai, _user(image, _SEES))
    assert answer.output_text == same.choices[0].message.content


def test_images_of_several_turns_keep_their_order(url: str, openai: OpenAI) -> None:
    first, second = made_image(6), made_image(7)
    turns = [
        *_user(first, "One."),
        {"role": "assistant", "content": "Good."},
        *_user("Now this:", second),
    ]
    swapped = [
        *_user(second, "One."),
        {"role": "assistant", "content": "Good."},
        *_user("Now this:", first),
    ]
    answers = [_ask(openai, chat, logprobs=True).choices[0] for chat in (turns, swapped)]
    logprobs = [answer.logprobs.content[0].logprob for answer in answers]
    assert abs(logprobs[0] - logprobs[1]) > 1e-3


def test_tokens_of_an_image_are_counted_by_tokenize(url: str, openai: OpenAI) -> None:
    messages = _user(made_image(3), _SEES)
    answer = httpx.post(f"{url}/tokenize", json={"messages": messages})
    assert answer.json()["count"] == _ask(openai, messages).usage.prompt_tokens


@pytest.mark.parametrize("continues", [False, True])
def test_templates_in_worker_processes_read_the_same_parts(url: str, continues: bool) -> None:
    messages = [*_user(made_image(3), _SEES), *([_BEGUN] if continues else [])]
    body = {"messages": messages, "continue_final_message": continues}
    ids = [
        httpx.post(f"{url}/tokenize", json={**body, **more}).json()["tokens"]
        for more in ({}, {"chat_template_kwargs": {"unread": 1}})  # arguments need a process
    ]
    assert ids[0] == ids[1]
    assert ids[0].count(IMAGE_ID) == 16


def test_a_template_that_names_no_images_gets_their_placeholders(url: str, tmp_path: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(save_tiny_vision("llava", tmp_path / "base"))
    row = PeftRow("own", lambda: LoraConfig(r=2, target_modules=["down_proj"]), moved(0.1))
    make_peft(row, base, tmp_path / "adapter")
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    files = {
        "config": (tmp_path / "adapter/adapter_config.json").read_bytes(),
        "weights": (tmp_path / "adapter/adapter_model.safetensors").read_bytes(),
        "chat_template": template.encode(),
    }
    put = httpx.put(f"{url}/v1/adapters/own", files=files)
    assert put.status_code == 201, put.text
    body = {"adapter": "own", "messages": _user("a", made_image(3), "b"), "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "return_token_ids": True})
    ids = answer.json()["prompt_token_ids"]
    text = httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == f"[a{'<image>' * 16}b]"


def _bomb() -> str:
    """Return a small PNG that claims a billion pixels."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (32_000).to_bytes(4, "big") * 2  # width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _half_a_jpeg() -> str:
    file = io.BytesIO()
    made_image(1).resize((64, 64)).save(file, "JPEG")
    half = file.getvalue()[: len(file.getvalue()) // 2]
    return f"data:image/jpeg;base64,{base64.b64encode(half).decode()}"


_BROKEN = base64.b64encode(base64.b64decode(png(made_image(1)))[:200]).decode()
_REFUSED = {
    "a remote URL": ("https://example.org/a.png", 400, "remote_image_refused", "data: URL"),
    "a broken file": (f"data:image/png;base64,{_BROKEN}", 400, "invalid_image", "broken"),
    "a broken JPEG": (_half_a_jpeg(), 400, "invalid_image", "broken"),
    "no base64": ("data:image/png;base64,???", 400, "invalid_image", "base64"),
    "a bomb": (_bomb(), 413, "image_too_large", "10,000"),
    "no image": ("data:text/plain;base64,aGVsbG8=", 400, "invalid_image", "no image"),
    "a number": (7, 400, None, "url"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_an_image_that_cannot_be_read_is_refused(url: str, name: str) -> None:
    value, status, code, told = _REFUSED[name]
    content = [*_user(made_image(1), _SEES)[0]["content"]]
    content.append({"type": "image_url", "image_url": {"url": value}})
    body = {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert told in error["message"]
    assert error["param"] == "messages[0].content[2].image_url.url"
    assert code in (None, error["code"])


def test_an_image_of_an_allowed_address_is_read(openai: OpenAI, web: WebFolder) -> None:
    remote = [{"type": "image_url", "image_url": {"url": f"{web.url}/shown/a.png"}}]
    text = {"type": "text", "text": _SEES}
    fetched = _ask(openai, [{"role": "user", "content": [*remote, text]}])
    sent = _ask(openai, _user(made_image(3), _SEES))
    assert fetched.choices[0].message.content == sent.choices[0].message.content
    assert fetched.usage.prompt_tokens == sent.usage.prompt_tokens


def test_anthropic_images_of_an_allowed_address_are_read(url: str, web: WebFolder) -> None:
    def n_tokens(**source: str) -> int:
        image = {"type": "image", "source": source}
        body = {"model": "base", "messages": [{"role": "user", "content": [image]}]}
        answer = httpx.post(f"{url}/v1/messages/count_tokens", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["input_tokens"])

    sent = n_tokens(type="base64", media_type="image/png", data=png(made_image(3)))
    web.asked.clear()
    assert n_tokens(type="url", url=f"{web.url}/shown/a.png") == sent
    assert web.asked == ["/shown/a.png"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/a.png", 400, "remote_image_refused"),  # beside what is allowed
        ("/shown/../a.png", 400, "remote_image_refused"),
        ("/shown/%2e%2e/a.png", 400, "remote_image_refused"),
        ("/shown/b.png", 400, "remote_image_unreadable"),  # 404
        ("/shown/large.bmp", 413, "image_too_large"),
    ],
)
def test_an_address_that_may_not_or_cannot_be_read_is_refused(
    url: str, web: WebFolder, path: str, status: int, code: str
) -> None:
    web.asked.clear()
    refused = _refusal(url, web.url + path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert bool(web.asked) is (code != "remote_image_refused")


def test_a_redirect_of_an_image_is_not_followed(url: str, web: WebFolder) -> None:
    web.redirect_to = "http://127.0.0.1:1"
    try:
        refused = _refusal(url, f"{web.url}/shown/a.png")
    finally:
        web.redirect_to = None
    assert refused.json()["error"]["code"] == "remote_image_unreadable"
    assert "redirects" in refused.json()["error"]["message"]


def _refusal(url: str, image: str) -> httpx.Response:
    content = [{"type": "image_url", "image_url": {"url": image}}]
    body = {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body)


def test_more_images_than_a_request_may_have_are_refused(url: str) -> None:
    messages = _user(*map(made_image, range(4)), _SEES)
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_images"


def test_a_text_with_the_placeholder_beside_an_image_is_refused(url: str) -> None:
    messages = _user(made_image(1), "Is <image> a tag?")
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "image_placeholders"


@pytest.mark.parametrize("target", ["patch_embedding", "position_embedding"])
def test_adapters_of_parts_that_take_none_are_refused_by_name(
    url: str, tmp_path: Path, target: str
) -> None:
    base = AutoModelForImageTextToText.from_pretrained(save_tiny_vision("llava", tmp_path / "base"))
    row = PeftRow(target, lambda: LoraConfig(r=2, target_modules=[target, "q_proj"]), moved(0.1))
    make_peft(row, base, tmp_path / "adapter")
    files = {
        "config": (tmp_path / "adapter/adapter_config.json").read_bytes(),
        "weights": (tmp_path / "adapter/adapter_model.safetensors").read_bytes(),
    }
    answer = httpx.put(f"{url}/v1/adapters/{target}", files=files)
    assert answer.status_code == 400, answer.text
    assert f"vision_tower.embeddings.{target}" in answer.text


def test_the_vector_of_a_chat_with_an_image_is_the_mean_of_its_states(
    url: str, tmp_path: Path
) -> None:
    messages = _user(made_image(1), _SEES)
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": "base", "messages": messages})
    assert answer.status_code == 200, answer.text
    path = save_tiny_vision("llava", tmp_path / "base")
    model, processor = AutoModelForImageTextToText.from_pretrained(path), processor_of(path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SEES}]}]
    text = processor.apply_chat_template(chat, tokenize=False)
    inputs = processor(text=[text], images=[made_image(1)], return_tensors="pt")
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state[0]
    expected = torch.nn.functional.normalize(states.mean(0), dim=-1)
    found = torch.tensor(answer.json()["data"][0]["embedding"])
    assert (found - expected).abs().max() < 1e-4


def test_images_of_vectors_are_limited_and_not_cut(url: str) -> None:
    def refused(field: str, **body: Any) -> bool:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": "base", **body})
        return answer.status_code == 400 and field in answer.text

    one = made_image(1)
    assert refused("too_many_images", messages=_user(one, one, one, one))
    assert refused("truncate_prompt_tokens", messages=_user(one), truncate_prompt_tokens=5)
    assert refused("image_url parts of messages", input=_data_url(one))


def test_a_base_that_reads_text_alone_refuses_an_image(tmp_path: Path) -> None:
    row = next(row for row in BASE_ROWS if row.id == "llama")
    path = save_base(row, tmp_path / "base")
    with app_of(path, tmp_path / "state", tiny_engine_config()) as app, served_app(app) as url:
        body = {"model": "base", "messages": _user(made_image(1), _SEES)}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        upload = {"type": "file", "file": {"file_id": "file-1"}}
        body["messages"] = [{"role": "user", "content": [upload]}]
        of_upload = httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == of_upload["code"] == "unsupported_content"
    assert "reads no images" in error["message"]
    assert error["param"] == "messages[0].content[0].image_url.url"
    assert of_upload["param"] == "messages[0].content[0].file.file_id"


@pytest.mark.parametrize("option", [{"quantization": "int8"}, {"tensor_parallel_size": 2}])
def test_options_of_text_bases_are_refused_at_start(tmp_path: Path, option: Any) -> None:
    path = save_tiny_vision("llava", tmp_path / "base")
    with (
        pytest.raises(ValueError, match="vision-language model"),
        app_of(path, tmp_path / "state", tiny_engine_config(**option)),
    ):
        pass
