"""Clients without an API key: trailers, connections that are held, bodies that nobody waits for."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse

import httpx
import pytest

from loraplex_server.connection_limit import N_SPARE
from loraplex_server.limited_http import BODY_CHECK_S, LINGER_S, N_GRACE_CHECKS
from tests.attacks.conftest import bystander, connect, peak_memory
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
MIB = 1 << 20
KEY = "root-secret"
MAX_CONNECTIONS = 8
HOST = b"Host: 127.0.0.1\r\n"
BEARER = b"Authorization: Bearer root-secret\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ANSWER = b'{"prompt":"a","max_tokens":1}'


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("keyed")
    flags = ("--api-key", KEY, "--max-connections", str(MAX_CONNECTIONS))
    with server_process(save_tiny_model(folder / "model"), folder / "state", *flags) as running:
        yield running


def ask(server: ServerProcess, path: str, key: str = KEY) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=30)


def assert_answered(server: ServerProcess) -> None:
    """Fails if a probe is refused, or a request again and again: a moment's crowd may be busy."""
    pause = threading.Event()
    for _ in range(100):
        assert ask(server, "/ready", key="").status_code == 200
        if (answer := ask(server, "/v1/models")).status_code == 200:
            return
        pause.wait(0.05)
    raise AssertionError(answer.text)


def status_of(connection: socket.socket) -> int:
    """Return the status of the next answer, and read all of it."""
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def all_of(connection: socket.socket) -> bytes:
    """Return what comes until the server closes. A reset counts as a close."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionError:
        pass
    return received


def seconds_until_closed(
    connection: socket.socket, piece: bytes, *, within_s: float, pause_s: float = 0.0
) -> float:
    """Send ``piece`` again and again until the server closes. Fails if it does not."""
    began, pause = time.monotonic(), threading.Event()
    while (seconds := time.monotonic() - began) < within_s:
        try:
            connection.sendall(piece)
        except ConnectionError:
            return seconds
        pause.wait(pause_s)
    raise AssertionError(f"open after {within_s} s")


def longest_wait(server: ServerProcess, seconds: float) -> float:
    with bystander(server.url, "/v1/models", KEY) as watcher:
        threading.Event().wait(seconds)
    return watcher.longest_s


@pytest.mark.parametrize("key", [b"", BEARER], ids=["no key", "a key"])
@pytest.mark.parametrize("trailers", [b"b", b"a: b\r\n"], ids=["one endless", "many"])
@broken_only_if_each_time
def test_trailers_cost_nobody_anything(keyed: ServerProcess, key: bytes, trailers: bytes) -> None:
    quiet_s = longest_wait(keyed, 1)
    sent = trailers * (MIB // len(trailers))
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + key + JSON + CHUNKED + b"\r\n0\r\na: "
    with (
        peak_memory(keyed, below_bytes=60 * MIB),
        bystander(keyed.url, "/v1/models", KEY) as watcher,
        connect(keyed) as attacker,
    ):
        attacker.sendall(head)
        seconds_until_closed(attacker, sent, within_s=6 * LINGER_S)
    check_below(watcher.longest_s, 10 * quiet_s + 0.5)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_a_key_in_a_trailer_is_no_key(keyed: ServerProcess, path: str) -> None:
    body = b"%x\r\n%s\r\n0\r\n" % (len(ANSWER), ANSWER)
    with connect(keyed) as attacker:
        line = b"POST %s HTTP/1.1\r\n" % path.encode()
        attacker.sendall(line + HOST + JSON + CHUNKED + b"\r\n" + body + BEARER + b"\r\n")
        answer = all_of(attacker)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"behind a chunked body" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_a_chunked_body_in_single_bytes_is_read(keyed: ServerProcess) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + BEARER + JSON + CHUNKED
    body = b"%x;ext=1\r\n%s\r\n1\r\n \r\n0\r\n\r\n" % (len(ANSWER), ANSWER)
    with connect(keyed) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(head + b"Connection: close\r\n\r\n")
        for byte in body:
            client.sendall(bytes([byte]))
        assert all_of(client).startswith(b"HTTP/1.1 200")


# What each of many connections sends before it says no more.
HELD = {
    "silent": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: 127",
    "answered": b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "answered before its body": b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n",
    "refused before its body": (
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: 999\r\n\r\n{"
    ),
    "reads no answer": (b"GET /console/console.js HTTP/1.1\r\n" + HOST + b"\r\n") * 9,
}


@pytest.mark.parametrize("held", HELD)
@broken_only_if_each_time
def test_many_connections_without_a_key_keep_nobody_out(keyed: ServerProcess, held: str) -> None:
    request = b"GET /v1/models HTTP/1.1\r\n" + HOST + BEARER + b"\r\n"
    with ExitStack() as opened, bystander(keyed.url, "/metrics", KEY):
        first = opened.enter_context(connect(keyed))
        with_key = opened.enter_context(connect(keyed))
        with_key.sendall(request)
        assert status_of(with_key) == 200
        for number in range(3 * (MAX_CONNECTIONS + N_SPARE)):
            attacker = opened.enter_context(connect(keyed, receive_bytes=4096))
            attacker.sendall(HELD[held])
            if number % 8 == 0:
                assert_answered(keyed)
        assert first.recv(1) == b""  # idle for the longest
        with_key.sendall(request)
        assert status_of(with_key) == 200


@contextmanager
def busy(server: ServerProcess, n: int) -> Iterator[list[socket.socket]]:
    """Requests with a key, which wait for the last byte of their bodies."""
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + BEARER + JSON
    with ExitStack() as opened:
        clients = [opened.enter_context(connect(server)) for _ in range(n)]
        for client in clients:
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER[:-1])
        yield clients


def test_probes_are_answered_while_all_connections_are_busy(keyed: ServerProcess) -> None:
    with busy(keyed, MAX_CONNECTIONS) as clients, ExitStack() as opened:
        for _ in range(2 * N_SPARE):
            opened.enter_context(connect(keyed))
        refused = ask(keyed, "/v1/models")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        for path, key, status in (
            *(("/health", "", 200), ("/ready", "", 200), ("/ping", "", 200)),
            *(("/metrics", "", 401), ("/metrics", KEY, 200)),
        ):
            assert ask(keyed, path, key).status_code == status
        clients[0].sendall(ANSWER[-1:])
        assert status_of(clients[0]) == 200
        assert ask(keyed, "/v1/models").status_code == 200
        for client in clients[1:]:
            client.sendall(ANSWER[-1:])
            assert status_of(client) == 200


def test_an_idle_connection_with_a_key_makes_room_for_one_that_asks(keyed: ServerProcess) -> None:
    request = b"GET /v1/models HTTP/1.1\r\n" + HOST + BEARER + b"\r\n"
    with ExitStack() as opened:
        idle = [opened.enter_context(connect(keyed)) for _ in range(MAX_CONNECTIONS + N_SPARE)]
        for connection in idle:
            connection.sendall(request)
            assert status_of(connection) == 200
        assert ask(keyed, "/v1/models").status_code == 200
        assert idle[0].recv(1) == b""


def test_an_answer_without_a_key_is_the_last_of_its_connection(keyed: ServerProcess) -> None:
    with connect(keyed) as stranger:
        stranger.sendall(b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n")
        answer = all_of(stranger)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"\r\nconnection: close\r\n" in answer


@broken_only_if_each_time
def test_a_body_behind_a_401_is_not_waited_for(keyed: ServerProcess) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: 99999999\r\n\r\n"
    began = time.monotonic()
    with connect(keyed) as stranger:
        stranger.sendall(head)
        assert all_of(stranger).startswith(b"HTTP/1.1 401")  # the server says no more
        check_below(time.monotonic() - began, BODY_CHECK_S)
        seconds_until_closed(stranger, b"a" * 200, within_s=6 * LINGER_S, pause_s=0.1)


def test_a_large_body_with_a_wrong_key_gets_its_401(keyed: ServerProcess) -> None:
    """A connection that was closed while the body comes would be reset instead."""
    for _ in range(10):
        with connect(keyed) as client:
            head = b"POST /v1/completions HTTP/1.1\r\n" + HOST + JSON
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % (8 * MIB))
            client.sendall(b"a" * 8 * MIB)
            assert status_of(client) == 401


def test_requests_that_wait_for_no_answer_are_few(keyed: ServerProcess) -> None:
    """Each kept its headers and its state until the answers before it were read."""
    requests = (b"GET /console/console.js HTTP/1.1\r\n" + HOST + b"\r\n") * 1000
    with peak_memory(keyed, below_bytes=30 * MIB), ExitStack() as opened:
        attackers = [opened.enter_context(connect(keyed)) for _ in range(2 * MAX_CONNECTIONS - 1)]
        for attacker in attackers:
            attacker.sendall(requests)
        for attacker in attackers:
            all_of(attacker)
        assert_answered(keyed)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\n" + HOST + BEARER + JSON,  # the application reads
        b"GET /health HTTP/1.1\r\n" + HOST,  # answered
    ],
    ids=["read", "answered"],
)
def test_a_body_has_a_deadline(keyed: ServerProcess, head: bytes) -> None:
    """Its pace is above the least of the first minute, and below the later one."""
    grace_s = BODY_CHECK_S * N_GRACE_CHECKS
    with connect(keyed) as slow:
        slow.sendall(head + b"Content-Length: 9999999\r\n\r\n")
        seconds = seconds_until_closed(slow, b"a" * 2000, within_s=3 * grace_s, pause_s=1)
    assert seconds > grace_s
