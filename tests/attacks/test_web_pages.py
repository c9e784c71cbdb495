"""Web pages in a local browser can make a server without keys do nothing."""

import httpx
import pytest

from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def code_of(answer: httpx.Response) -> str:
    assert answer.status_code in (403, 415), answer.text
    return str(answer.json()["error"]["code"])


def test_a_page_of_another_origin_may_not_write(server: ServerProcess) -> None:
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/adapters/generate", {"description": "x"}),
        ("/v1/adapters/x/pin", None),
    ):
        for page in ("https://evil.example", "null", "http://["):
            headers = {"origin": page}
            answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=30)
            assert code_of(answer) == "origin_not_allowed"


def test_a_name_that_was_bound_to_this_machine_reads_nothing(server: ServerProcess) -> None:
    for path in ("/v1/models", "/v1/adapters", "/metrics", "/docs"):
        answer = httpx.get(f"{server.url}{path}", headers={"host": "evil.example"}, timeout=30)
        assert code_of(answer) == "host_not_allowed"


def test_what_a_form_can_send_is_not_read(server: ServerProcess) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=b'{"messages":[{"role":"user","content":"hi"}]}',
        headers={"content-type": "text/plain"},
        timeout=30,
    )
    assert code_of(answer) == "unsupported_media_type"


def test_the_page_of_this_server_itself_may(server: ServerProcess) -> None:
    own = {"origin": server.url}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=own, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
