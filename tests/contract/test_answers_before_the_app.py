"""Answers that the application never sees: they, too, are the error object."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

MAX_CONNECTIONS = 8
HEAD = b"Host: 127.0.0.1\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("front")
    flags = ("--max-connections", str(MAX_CONNECTIONS))
    with server_process(save_tiny_model(folder / "model"), folder / "state", *flags) as running:
        yield running


def connect(server: ServerProcess) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=60)


def answer_to(connection: socket.socket, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; reads until the server closes."""
    connection.sendall(sent)
    received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


def assert_error(body: bytes, headers: dict[str, str], code: str) -> None:
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01 nonsense\r\n\r\n", 400, "invalid_http"),
        (b"BREW /health HTTP/1.1\r\n" + HEAD + b"\r\n", 400, "invalid_http"),
        (b"GET /h\xff HTTP/1.1\r\n" + HEAD + b"\r\n", 400, "invalid_http"),
        (b"CONNECT example.org:443 HTTP/1.1\r\n" + HEAD + b"\r\n", 400, "invalid_http"),
        (
            b"POST /v1/completions HTTP/1.1\r\n"
            + HEAD
            + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx",
            400,
            "invalid_http",
        ),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n" + HEAD + b"\r\n", 400, "invalid_http"),
        (
            b"POST /v1/completions HTTP/1.1\r\n"
            + HEAD
            + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Last: 1\r\n\r\n",
            400,
            "invalid_http",
        ),
        (b"POST /v1/completions/ HTTP/1.1\r\n" + HEAD + b"\r\n", 404, "unknown_url"),
        (b"GET /?" + b"x" * (70 << 10) + b" HTTP/1.1\r\n" + HEAD + b"\r\n", 431, "head_too_large"),
        (b"GET /nowhere HTTP/1.1\r\n" + HEAD + b"\r\n", 404, "unknown_url"),
        (b"GET /static-offline-docs/../x HTTP/1.1\r\n" + HEAD + b"\r\n", 404, "unknown_url"),
        (b"POST /docs HTTP/1.1\r\n" + HEAD + b"\r\n", 405, "method_not_allowed"),
        (b"TRACE /health HTTP/1.1\r\n" + HEAD + b"\r\n", 405, "method_not_allowed"),
        (b"POST /v1/adapters/x HTTP/1.1\r\n" + HEAD + b"\r\n", 405, "method_not_allowed"),
        (b"PUT /v1/adapters/x/pin HTTP/1.1\r\n" + HEAD + b"\r\n", 405, "method_not_allowed"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_every_refusal_is_the_error_object(
    server: ServerProcess, sent: bytes, status: int, code: str
) -> None:
    with connect(server) as connection:
        answered, headers, body = answer_to(connection, sent)
    assert answered == status
    assert_error(body, headers, code)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/adapters/x", "DELETE, GET, PATCH, PUT"),
        ("/v1/adapters/org/x", "DELETE, GET, PATCH, PUT"),
        ("/v1/adapters/pin", "DELETE, GET, PATCH, PUT"),
        ("/v1/adapters/x/pin", "POST"),
        ("/v1/adapters/x/unload", "POST"),
        ("/v1/adapters/generate", "POST"),
        ("/health", "GET, HEAD"),
    ],
)
def test_allow_names_every_method_of_a_path(server: ServerProcess, path: str, allowed: str) -> None:
    with connect(server) as connection:
        sent = b"OPTIONS %s HTTP/1.1\r\n%s\r\n" % (path.encode(), HEAD)
        status, headers, _ = answer_to(connection, sent)
    assert status == 405
    # a route that comes later may add methods, none goes
    assert set(re.split(", ?", headers["allow"])) >= set(allowed.split(", "))
    assert ("PUT" in headers["allow"]) == ("PUT" in allowed)


def test_an_invalid_request_behind_an_answer_does_not_spoil_it(server: ServerProcess) -> None:
    """Both come in one packet: the first is answered or not, but nothing is mixed into it."""
    with connect(server) as connection:
        sent = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n\x16nonsense\r\n\r\n"
        connection.sendall(sent)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1") <= 1
    assert b"invalid_http" not in received or received.startswith(b"HTTP/1.1 400")


def test_a_path_with_a_slash_too_many_names_the_right_one(server: ServerProcess) -> None:
    """A redirect would be built from the Host header."""
    sent = b"POST /v1/chat/completions/ HTTP/1.1\r\nHost: localhost:1\r\nConnection: close\r\n\r\n"
    with connect(server) as connection:
        status, headers, body = answer_to(connection, sent)
    assert status == 404
    assert "location" not in headers
    assert "use /v1/chat/completions, without" in json.loads(body)["error"]["message"]


def test_a_server_that_is_full_says_so_and_when_to_come_back(server: ServerProcess) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with ExitStack() as held:
        for _ in range(MAX_CONNECTIONS):
            held.enter_context(connect(server)).sendall(head + b"Content-Length: 9\r\n\r\n{")
        with connect(server) as late:
            status, headers, body = answer_to(late, request)
        assert status == 503
        assert_error(body, headers, "too_many_connections")
        assert 1 <= int(headers["retry-after"]) <= 60
    answer = b""
    for _ in range(1000):  # until the server has seen that the others left
        with connect(server) as connection:
            connection.sendall(request)
            answer = connection.recv(65536)
        if answer.startswith(b"HTTP/1.1 200"):
            break
    assert answer.startswith(b"HTTP/1.1 200")
