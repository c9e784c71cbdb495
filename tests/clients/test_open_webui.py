"""Open WebUI: its own server, asked as its pages ask it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLIENT = "open-webui"

_START_S = 600  # it imports a lot
_HELLO = [{"role": "user", "content": "Hello!"}]


class WebUi:
    def __init__(self, url: str) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json"}

    def sign_in(self) -> None:
        token = self.json("/api/v1/auths/signin", {"email": "", "password": ""})["token"]
        self._headers["Authorization"] = f"Bearer {token}"

    def text(self, path: str, body: object = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            text: str = answer.read().decode()
        return text

    def json(self, path: str, body: object = None) -> Any:
        return json.loads(self.text(path, body))


@pytest.fixture(scope="module")
def webui(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUi]:
    folder = tmp_path_factory.mktemp("webui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "DATA_DIR": str(folder / "data"),
        "ENABLE_OLLAMA_API": "False",
        "OFFLINE_MODE": "True",
        "OPENAI_API_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "RAG_EMBEDDING_ENGINE": "openai",
        "RAG_EMBEDDING_MODEL": "all-minilm-l6-v2",
        "RAG_OPENAI_API_BASE_URL": f"{url}/v1",
        "RAG_OPENAI_API_KEY": "none",
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "of this run",
    }
    command = [Path(sys.executable).with_name("open-webui"), "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        webui = WebUi(f"http://127.0.0.1:{port}")
        _wait_until_ready(webui, process, log)
        webui.sign_in()
        yield webui
    finally:
        process.kill()
        process.wait(60)


def _wait_until_ready(webui: WebUi, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + _START_S
    while True:
        try:
            webui.text("/health")
        except urllib.error.URLError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.5)
        else:
            return


def test_models(webui: WebUi) -> None:
    """every adapter is a model to choose"""
    listed = [model["id"] for model in webui.json("/api/models")["data"]]
    assert {"pirate", "tool-calls", "all-minilm-l6-v2"} <= set(listed)


def test_chat(webui: WebUi, ask: Callable[[str, str], str]) -> None:
    """a streamed chat with an adapter, its usage at the end"""
    body = {
        "model": "pirate",
        "messages": _HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "params": {},
        "temperature": 0,
        "max_tokens": 40,
    }
    lines = webui.text("/api/chat/completions", body).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == ask("pirate", "Hello!")
    assert events[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("task", ["title", "tags", "follow_up"])
def test_tasks(webui: WebUi, task: str) -> None:
    """what it asks for beside a chat: a title, tags, follow-up questions"""
    told = [*_HELLO, {"role": "assistant", "content": "Ahoy!"}]
    body = {"model": "pirate", "messages": told}
    answer = webui.json(f"/api/v1/tasks/{task}/completions", body)
    assert isinstance(answer["choices"][0]["message"]["content"], str)  # sampled: any text
    assert answer["adapter"]["name"] == "pirate"


def test_embeddings(webui: WebUi) -> None:
    """embeddings"""
    texts = ["a small cat", "a kitten", "the stock market fell"]
    answer = webui.json("/api/embeddings", {"model": "all-minilm-l6-v2", "input": texts})
    cat, kitten, market = (item["embedding"] for item in answer["data"])
    assert sum(map(float.__mul__, cat, kitten)) > sum(map(float.__mul__, cat, market)) + 0.2
