"""Requests whose heads never end, connections that say nothing, bodies that trickle."""

from contextlib import ExitStack

import httpx
import pytest

from tests.attacks.conftest import bystander, connect, memory_bytes
from tests.support.bounds import broken_only_if_each_time
from tests.support.servers.server_process import ServerProcess

pytestmark = pytest.mark.slow
MIB = 1 << 20


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: "])
@broken_only_if_each_time
def test_a_head_without_end_is_cut_off(server: ServerProcess, start: bytes) -> None:
    before = memory_bytes(server)
    n_sent = 0
    with bystander(server.url), connect(server) as attacker:
        attacker.sendall(start)
        try:
            for _ in range(60):
                attacker.sendall(b"a" * MIB)
                n_sent += 1
        except OSError:  # the server has closed
            pass
    assert n_sent < 60
    assert memory_bytes(server) - before < 30 * MIB


def test_a_head_that_is_too_large_is_told_so(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"x-long": "a" * (70 << 10)}, timeout=30)
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "head_too_large"


@pytest.mark.nightly
def test_connections_that_say_no_more_are_closed(server: ServerProcess) -> None:
    beginnings = (
        b"",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b'Content-Length: 1000\r\n\r\n{"prompt',
    )
    with ExitStack() as open_ones:
        silent = [open_ones.enter_context(connect(server)) for _ in beginnings]
        for connection, sent in zip(silent, beginnings, strict=True):
            connection.sendall(sent)
        for connection, sent in zip(silent, beginnings, strict=True):
            assert connection.recv(1000) == b"", sent  # raises TimeoutError after a minute


def test_what_is_no_http_is_a_400_in_the_usual_shape(server: ServerProcess) -> None:
    with connect(server) as odd:
        odd.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        answer = odd.recv(4000)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"invalid_http"' in answer


def test_a_websocket_is_not_offered(server: ServerProcess) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    answer = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=30)
    assert answer.status_code == 200
