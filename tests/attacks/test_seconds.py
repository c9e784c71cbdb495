"""A flood of one key beside another key's stream: the stream keeps half of its fair share.

With two tenants of one weight the fair share is half of the rate that the stream has alone, which
is measured first.
"""

import asyncio
import hashlib
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import httpx
import pytest

from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import ServerProcess, server_process

pytestmark = pytest.mark.slow
N_PROMPT, N_ROWS, N_TOKENS = 2000, 40, 20
FLOOD, STREAM = "flood-secret", "stream-secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("seconds")
    model = folder / "model"
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    base = tiny_model(
        intermediate_size=2048,
        num_hidden_layers=8,
        max_position_embeddings=8192,
        eos_token_id=2,
        **wide,
    )
    base.save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    keys = folder / "keys.toml"
    keys.write_text(_key("flood", FLOOD) + _key("stream", STREAM))
    with server_process(
        model, folder / "state", "--keys", keys, "--kv-memory", "256MiB"
    ) as running:
        yield running


def _key(name: str, secret: str) -> str:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscope = "infer"\n'


class _Stream:
    """A stream of tokens, read in a thread; ``times`` are those of its tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.began = threading.Event()
        self.stop = threading.Event()

    def read(self, url: str) -> None:
        body = {"prompt": "Once", "max_tokens": 8000, "stream": True, "ignore_eos": True}
        headers = {"authorization": f"Bearer {STREAM}"}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
        ) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.times.append(time.monotonic())
                    self.began.set()
                if self.stop.is_set():
                    return

    def gaps(self, start: float, end: float) -> list[float]:
        """The gaps between tokens from ``start`` to ``end``, these two included."""
        times = [start, *(at for at in self.times if start < at < end), end]
        return [later - at for at, later in pairwise(times)]


@contextmanager
def _stream(url: str) -> Iterator[_Stream]:
    stream = _Stream()
    thread = threading.Thread(target=stream.read, args=(url,))
    thread.start()
    assert stream.began.wait(60)
    try:
        yield stream
    finally:
        stream.stop.set()
        thread.join()


def _flood(url: str) -> list[list[int]]:
    """Return the answers to a long prompt, whose KV cache each of them reads in each step."""
    body = {
        "prompt": [3 + number % 200 for number in range(N_PROMPT)],
        "n": N_ROWS,
        "max_tokens": N_TOKENS,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": 7,
        "return_token_ids": True,
    }
    headers = {"authorization": f"Bearer {FLOOD}"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=300)
    assert answer.status_code == 200, answer.text
    return [choice["token_ids"] for choice in answer.json()["choices"]]


@broken_only_if_each_time
def test_a_stream_keeps_half_of_its_fair_share_beside_long_rows(server: ServerProcess) -> None:
    expected = _flood(server.url)  # its prompt is in the prefix cache from here on
    began = time.monotonic()
    assert _flood(server.url) == expected
    flood_alone_s = time.monotonic() - began
    with _stream(server.url) as stream:
        began = time.monotonic()
        stream.stop.wait(3.0)
        alone = stream.gaps(began, time.monotonic())
        began = time.monotonic()
        assert _flood(server.url) == expected
        ended = time.monotonic()
        beside = stream.gaps(began, ended)
    fair_rate = len(alone) / sum(alone) / 2
    step_s = flood_alone_s / N_TOKENS
    check_below(4 * statistics.median(alone), step_s)  # without turns each gap is a step
    check_below(fair_rate / 2, len(beside) / sum(beside), "tokens a second")
    check_below(max(beside), max(0.5, 4 * max(alone)), "seconds between tokens")
    check_below(ended - began, 4 * flood_alone_s, "seconds of the flood")


@pytest.mark.nightly
@broken_only_if_each_time
def test_a_stream_keeps_half_of_its_fair_share_beside_long_texts_for_vectors(
    server: ServerProcess,
) -> None:
    """The texts are read and tokenised while the stream runs, then computed."""
    words = " ".join(["river", "stone", "light", "house", "cloud"] * 100)
    body = {"input": [f"{number} {words}" for number in range(256)]}
    headers = {"authorization": f"Bearer {FLOOD}"}
    flooding = threading.Event()

    async def flood() -> None:
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=None) as client:
            calls = [asyncio.ensure_future(client.post("/v1/embeddings", json=body)) for _ in "ab"]
            while flooding.is_set() and not any(call.done() for call in calls):
                await asyncio.sleep(0.05)
            for call in calls:
                call.cancel() if not call.done() else call.result().raise_for_status()

    with _stream(server.url) as stream:
        began = time.monotonic()
        stream.stop.wait(3.0)
        alone = stream.gaps(began, time.monotonic())
        flooding.set()
        thread = threading.Thread(target=asyncio.run, args=(flood(),))
        began = time.monotonic()
        thread.start()
        stream.stop.wait(5.0)
        beside = stream.gaps(began, time.monotonic())
        assert thread.is_alive()  # the flood took longer
        flooding.clear()
        thread.join()
    fair_rate = len(alone) / sum(alone) / 2
    print(f"{len(beside) / sum(beside) / fair_rate:.2f} of the fair rate, gap {max(beside):.2f} s")
    check_below(fair_rate / 2, len(beside) / sum(beside), "tokens a second")
    check_below(max(beside), max(0.5, 4 * max(alone)), "seconds between tokens")
