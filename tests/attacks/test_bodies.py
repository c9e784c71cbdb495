"""Bodies that are valid JSON and mean to cost more than their answer."""

from __future__ import annotations

import httpx
import pytest

from tests.attacks.conftest import bystander, memory_bytes
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow
JSON = {"content-type": "application/json"}
MIB = 1 << 20


def refused(server: ServerProcess, path: str, body: bytes | dict[str, object]) -> str:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.post(f"{server.url}{path}", headers=JSON, timeout=60, **content)  # type: ignore[arg-type]
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert len(answer.content) < 2000
    return str(answer.json()["error"]["param"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b'{"prompt":[' + b"{}," * 2_000_000 + b"{}]}", "prompt"),
        ("/v1/completions", b'{"prompt":[[' + b'"a",' * 1_000_000 + b"1]]}", "prompt"),
        (
            "/v1/chat/completions",
            b'{"messages":[' + b"{}," * 2_000_000 + b"{}]}",
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            b'{"messages":[{"role":"user","content":"x"}],"logit_bias":{'
            + b",".join(b'"x%d":"y"' % n for n in range(500_000))
            + b"}}",
            "logit_bias",
        ),
        ("/detokenize", b'{"tokens":[' + b'"a",' * 1_000_000 + b"1]}", "tokens[0]"),
    ],
    ids=["objects", "nested", "messages", "logit_bias", "tokens"],
)
def test_parsing_stops_at_the_first_mistake(
    server: ServerProcess, path: str, body: bytes, param: str
) -> None:
    before = memory_bytes(server)
    with bystander(server.url):
        assert refused(server, path, body) == param
    assert memory_bytes(server) - before < 400 * MIB  # the parsed body itself, for a moment


def test_unknown_names_are_not_kept(server: ServerProcess) -> None:
    def ask(number: int) -> None:
        name = f"{number}" + "n" * MIB
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, name: 1}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200

    for number in range(4):
        ask(number)
    before = memory_bytes(server)
    for number in range(4, 24):
        ask(number)
    assert memory_bytes(server) - before < 15 * MIB


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenised(
    server: ServerProcess, path: str
) -> None:
    with bystander(server.url):
        assert refused(server, path, {"prompt": "word " * 2_000_000}) == "prompt"
