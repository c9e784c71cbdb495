"""JSON that nests too deep is a 400 wherever it comes from, and the server goes on as it was."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.attacks.conftest import bystander, cpu_s
from tests.fuzz.adapter_files import CONFIG
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
LIMIT = 100  # nested lists and objects
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """Fails if the test left a part of the server degraded."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        health = client.get("/health").json()
        assert health["status"] == "ok", health


def nested(depth: int, inside: str = "1") -> str:
    """JSON of ``depth`` lists and objects."""
    return "".join('{"a":' if n % 2 else "[" for n in range(depth)) + (
        inside + "".join("}" if n % 2 else "]" for n in reversed(range(depth)))
    )


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 1000
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_every_route_refuses_a_deep_body(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    routes = [
        (method, path)
        for path, methods in paths.items()
        for method, operation in methods.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]
    assert len(routes) > 20
    headers = {"content-type": "application/json"}
    for method, path in routes:
        for depth in (LIMIT + 1, 255, 300, 1000, 100_000):
            url = path.replace("{name}", "x")
            answer = client.request(method, url, content=nested(depth), headers=headers)
            assert refused(answer)["code"] == "too_deep", (method, path, depth)


def test_nesting_up_to_the_limit_and_brackets_in_texts_are_served(client: httpx.Client) -> None:
    deepest = json.loads(nested(LIMIT - 1))
    content = 300 * '[{"\\' + "hi"
    for field in ({"verbosity": deepest}, {"messages": [{"role": "user", "content": content}]}):
        answer = client.post("/v1/chat/completions", json={**CHAT, **field})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("depth", [LIMIT + 1, 300, 1500, 100_000])
def test_deep_json_in_texts_and_files_is_refused(client: httpx.Client, depth: int) -> None:
    text = nested(depth)
    schema = client.post("/v1/chat/completions", json={**CHAT, "guided_json": text})
    assert refused(schema)["param"] == "guided_json"
    function = {"name": "f", "arguments": text}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}
    chat = {**CHAT, "messages": [*CHAT["messages"], called]}  # type: ignore[misc]
    assert refused(client.post("/v1/chat/completions", json=chat))["code"] == "too_deep"
    line = '{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x","b":%s}}'
    lines = f"{line % 1}\n{line % text}\n"
    file = client.post("/v1/files", files={"file": ("a", lines)}, data={"purpose": "batch"})
    assert "line 2" in refused(file)["message"]
    for part, value in (("config", text), ("config", json.dumps(CONFIG)[:-1] + f',"x":{text}}}')):
        parts = {"config": "{}", "weights": b"x", part: value}
        answer = client.put("/v1/adapters/deep", files=parts)
        assert "nest" in refused(answer)["message"]
    card = {"config": "{}", "weights": b"x", "card": f'{{"defaults":{text}}}'}
    assert "nest" in refused(client.put("/v1/adapters/deep", files=card))["message"]


@broken_only_if_each_time
def test_a_hundred_thousand_tensors_are_refused_at_the_header(
    server: ServerProcess, client: httpx.Client
) -> None:
    entry = '"t%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = "{" + ",".join(entry % (n, 4 * n, 4 * n + 4) for n in range(100_000)) + "}"
    weights = struct.pack("<Q", len(header)) + header.encode() + bytes(400_000)
    before = cpu_s(server)
    with bystander(server.url):
        answer = client.put(
            "/v1/adapters/many", files={"config": json.dumps(CONFIG), "weights": weights}
        )
    assert "50,000 tensors" in refused(answer, 413)["message"]
    check_below(cpu_s(server) - before, 1)
