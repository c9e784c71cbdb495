"""No callback of the event loop takes 50 ms of processor time, whatever a client may send."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.limited_http import LimitedHttp
from loraplex_server.settings.config import HttpConfig
from loraplex_server.text.text_pipeline import TextPipeline
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.loop_watch import LoopWatch

LIMIT_S = 0.05
N_ADAPTERS = 500
JSON = {"content-type": "application/json"}
LONG = 1_000_000  # tokens of context: so that no text is refused for its length


class Served:
    """A front behind the server's own HTTP, its event loop in a thread that is watched."""

    def __init__(self, front: Front, watch: LoopWatch, folder: Path) -> None:
        self.front, self.watch, self.folder = front, watch, folder
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        options = {"lifespan": "off", "log_config": None, "access_log": False, "ws": "none"}
        self._server = uvicorn.Server(
            uvicorn.Config(front.app, http=LimitedHttp, **options)  # type: ignore[arg-type]
        )
        self._thread = threading.Thread(target=self._run, args=[listening])
        self._thread.start()

    def _run(self, listening: socket.socket) -> None:
        async def main() -> None:
            self.watch.watch_this_thread()
            self.loop = asyncio.get_running_loop()
            lag = asyncio.create_task(self.front.app.state.parts.metrics.loop_lag.watch())
            await self._server.serve(sockets=[listening])
            lag.cancel()
            await self.front.app.state.parts.text.close()

        asyncio.run(main())

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.front.store.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=120, **options)

    def send_watched(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.watch.check(LIMIT_S, lambda: self.send(method, path, **options))


@pytest.fixture(scope="module")
def served(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("watched")
    http = HttpConfig(served_model_names=("base",))
    front = make_front(tokenizer, base_spec, folder, http)
    front.engine.max_model_len = LONG
    source = write_lora(front.root / "lora", base_spec, chat_template="{{ messages[0].content }}")
    for number in range(N_ADAPTERS):
        front.store.put_directory(f"adapter-{number:03}", source)
    with pytest.MonkeyPatch.context() as patch:
        served = Served(front, LoopWatch(patch), source)
        for path in ("/v1/models", "/v1/adapters", "/metrics", "/openapi.json", "/health"):
            served.send("GET", path)  # what is made once
        gc.collect()
        gc.freeze()  # as the server does when it has started
        yield served
        served.close()


def _chat(text: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1, **more}


_BODY = 15 << 20  # bytes; 16 MiB are accepted
_VALUES = 149_000  # 150,000 are accepted, keys counted
TEXT = "wörd, " * 100_000
DEEP: Any = json.loads('{"a":' * 30 + "[" + "{}," * _VALUES + "1]" + "}" * 30)
DIFFERENT = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3, 4, 5, 6]}}
_ASKED = {"role": "user", "content": "h"}


def _objects(n_bytes: int) -> str:
    """The text of an object of so many bytes, and a third as many values."""
    return '{"x":[' + "{}," * (n_bytes // 3 - 4) + "1]}"


def _called(arguments: str) -> dict[str, object]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [_ASKED, {"role": "assistant", "tool_calls": [call]}], "max_tokens": 1}


def _responded(arguments: str) -> dict[str, object]:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
    return {"input": [_ASKED, call], "max_output_tokens": 1}


POSTS: dict[str, tuple[str, Any]] = {
    "chat": ("/v1/chat/completions", _chat(TEXT)),
    "messages": ("/v1/chat/completions", {"messages": _chat("h")["messages"] * (_VALUES // 4)}),
    "adapter's template": ("/v1/chat/completions", _chat(TEXT, adapter="adapter-001")),
    "template arguments": ("/v1/chat/completions", _chat("h", chat_template_kwargs={"x": DEEP})),
    "long arguments": ("/v1/chat/completions", _chat("h", chat_template_kwargs={"x": "a" * _BODY})),
    "tools": ("/v1/chat/completions", _chat("h", tools=[{}] * _VALUES)),
    "completion": ("/v1/completions", {"prompt": TEXT, "max_tokens": 1}),
    "unfit": ("/v1/completions", {"prompt": "a, " * (_BODY // 3)}),
    "ids": ("/v1/completions", {"prompt": [5] * _VALUES, "max_tokens": 1}),
    "prompts of ids": ("/v1/completions", {"prompt": [[5]] * _VALUES}),
    "biases": (
        "/v1/completions",
        {"prompt": "hi", "logit_bias": dict.fromkeys(range(_VALUES // 2), 1)},
    ),
    "unknown fields": ("/v1/completions", {"prompt": "hi", "max_tokens": 1, "odd": DEEP}),
    "wrong types": ("/v1/completions", {"prompt": [{}] * _VALUES}),
    "too many values": ("/v1/completions", {"prompt": [5] * (_BODY // 3)}),
    "too many strings": ("/v1/completions", {"prompt": ["a"] * (_BODY // 5)}),
    "unknown adapter": ("/v1/completions", {"prompt": "hi", "adapter": "adapter-9999"}),
    "tokenize": ("/tokenize", {"prompt": TEXT}),
    "detokenize": ("/detokenize", {"tokens": [5] * 140_000}),
    "embeddings": ("/v1/embeddings", {"input": ["a b c"] * 2048}),
    "texts": ("/v1/embeddings", {"input": ["a"] * _VALUES}),
    "schema": ("/v1/chat/completions", _chat("h", structured_outputs={"json": DEEP})),
    "schema as a text": (
        "/v1/chat/completions",
        _chat("h", structured_outputs={"json": _objects(_BODY)}),
    ),
    "many schemas": ("/v1/chat/completions", _chat("h", json_schema={"allOf": [{}] * 60_000})),
    "lists of different items": (
        "/v1/chat/completions",
        _chat("h", json_schema={"properties": {f"p{i}": DIFFERENT for i in range(990)}}),
    ),
    "arguments of a call": ("/v1/chat/completions", _called(_objects(1 << 20))),
    "too long arguments of a call": ("/v1/chat/completions", _called(_objects(_BODY))),
    "arguments of an item": ("/v1/responses", _responded(_objects(1 << 20))),
    "too long arguments of an item": ("/v1/responses", _responded(_objects(_BODY))),
}


@pytest.mark.parametrize("name", POSTS)
def test_a_large_body_holds_no_callback_for_long(served: Served, name: str) -> None:
    path, body = POSTS[name]
    sent = json.dumps(body, separators=(",", ":")).encode()
    served.send("POST", path, json={})  # what is made once
    answer = served.send_watched("POST", path, content=sent, headers=JSON)
    assert answer.status_code in {200, 400, 404}, answer.text


def test_values_are_counted_and_commas_in_texts_are_not(served: Served) -> None:
    def send(**body: object) -> httpx.Response:
        return served.send("POST", "/v1/completions", json={"max_tokens": 1, **body})

    text = 'a, "b\\", c\\\\", ' * 60_000
    assert send(prompt="x", odd=text).status_code == 200
    answer = send(prompt="x", odd=[text, *[0] * 150_000])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_values"
    assert "more than 150,000 keys and values" in answer.json()["error"]["message"]
    assert send(prompt="x", odd=[text, *[0] * 149_000]).status_code == 200
    pairs = {f'"{number},:\\': [] for number in range(74_000)}
    assert send(prompt="x", odd=[text, pairs]).status_code == 200
    assert send(prompt="x", odd=[text, pairs, pairs]).status_code == 400


@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/metrics", "/health"])
def test_listings_of_many_adapters_hold_no_callback_for_long(served: Served, path: str) -> None:
    answer = served.send_watched("GET", path)
    assert answer.status_code == 200
    assert path == "/health" or answer.text.count("adapter") >= 20


def test_the_source_of_an_adapter_holds_no_callback_for_long(served: Served) -> None:
    body = {"source": "x", "examples": [{}] * (_BODY // 3)}
    sent = json.dumps(body, separators=(",", ":")).encode()
    answer = served.send_watched("PUT", "/v1/adapters/large", content=sent, headers=JSON)
    assert answer.json()["error"]["code"] == "too_many_values"


def test_an_upload_holds_no_callback_for_long(served: Served) -> None:
    header = json.dumps({f"tensor{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                         for n in range(50_000)}).encode()  # fmt: skip
    files = {
        "config": (served.folder / "adapter_config.json").read_bytes(),
        "weights": len(header).to_bytes(8, "little") + header + bytes(8 << 20),
    }
    answer = served.send_watched("PUT", "/v1/adapters/large", files=files)
    assert answer.status_code == 400


def test_other_threads_go_on_while_a_long_text_becomes_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Tokenising must not hold Python's lock, which the engine needs between its steps."""

    async def longest_pause() -> float:
        """Return the longest pause of the event loop, as a share of the time of the call."""
        text = TextPipeline(tokenizer)
        encoding = asyncio.ensure_future(text.encode_many(["word " * 100_000], tenant="a"))
        began = last = time.perf_counter()
        longest_s = 0.0
        while not encoding.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest_s, last = max(longest_s, now - last), now
        await text.close()
        assert len(await encoding) == 1
        return longest_s / (time.perf_counter() - began)

    assert asyncio.run(longest_pause()) < 0.4


def test_the_watch_sees_a_callback_that_works_too_long(served: Served) -> None:
    """So that the tests above can fail; the lag that it makes is in the metric."""
    called = threading.Event()

    def work() -> None:
        sum(range(20_000_000))
        called.set()

    def act() -> None:
        called.clear()
        served.loop.call_soon_threadsafe(work)
        assert called.wait(60)
        served.send("GET", "/health")  # the callback has returned

    with pytest.raises(AssertionError, match="work"):
        served.watch.check(LIMIT_S, act)
    families = text_string_to_metric_families(served.send("GET", "/metrics").text)
    (lag,) = [f for f in families if f.name == "loraplex_event_loop_lag_seconds"]
    assert sum(s.value for s in lag.samples if s.name.endswith("_count")) > 0
