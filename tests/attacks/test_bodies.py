"""Bodies that are valid JSON and mean to cost more than their answer."""

import httpx
import pytest

from tests.attacks.conftest import bystander, memory_bytes, peak_memory
from tests.support.bounds import broken_only_if_each_time
from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
JSON = {"content-type": "application/json"}
MIB = 1 << 20
N_VALUES = 149_000  # 150,000 are read, keys counted


def refused(server: ServerProcess, path: str, body: bytes | dict[str, object]) -> str:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = httpx.post(f"{server.url}{path}", headers=JSON, timeout=60, **content)  # type: ignore[arg-type]
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert len(answer.content) < 2000
    return str(answer.json()["error"]["param"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b'{"prompt":[' + b"{}," * N_VALUES + b"{}]}", "prompt"),
        ("/v1/completions", b'{"prompt":[[' + b'"a",' * N_VALUES + b"1]]}", "prompt"),
        (
            "/v1/chat/completions",
            b'{"messages":[' + b"{}," * N_VALUES + b"{}]}",
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            b'{"messages":[{"role":"user","content":"x"}],"logit_bias":{'
            + b",".join(b'"x%d":"y"' % n for n in range(N_VALUES // 2))
            + b"}}",
            "logit_bias",
        ),
        ("/detokenize", b'{"tokens":[' + b'"a",' * N_VALUES + b"1]}", "tokens[0]"),
    ],
    ids=["objects", "nested", "messages", "logit_bias", "tokens"],
)
@broken_only_if_each_time
def test_parsing_stops_at_the_first_mistake(
    server: ServerProcess, path: str, body: bytes, param: str
) -> None:
    before = memory_bytes(server)
    with bystander(server.url):
        assert refused(server, path, body) == param
    assert memory_bytes(server) - before < 100 * MIB  # the parsed body itself, for a moment


@pytest.mark.parametrize("values", [b"{},", b"[[],0],", b'"a",', b"1,"])
@broken_only_if_each_time
def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(
    server: ServerProcess, values: bytes
) -> None:
    body = b'{"prompt":[' + values * (15 * MIB // len(values)) + b"1]}"
    before = memory_bytes(server)
    with bystander(server.url):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "too_many_values"
    assert memory_bytes(server) - before < 100 * MIB


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
@broken_only_if_each_time
def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenised(
    server: ServerProcess, path: str
) -> None:
    with bystander(server.url):
        assert refused(server, path, {"prompt": "word " * 2_000_000}) == "prompt"


def test_a_description_for_a_base_without_generator_loads_none(server: ServerProcess) -> None:
    """Each took 120 MiB for a moment, only to be refused."""

    def ask(number: int) -> None:
        body: dict[str, object] = {"description": f"translates to French {number}", "probe": False}
        refused(server, "/v1/adapters/generate", body)

    ask(0)
    with peak_memory(server, below_bytes=30 * MIB):
        for number in range(1, 6):
            ask(number)
