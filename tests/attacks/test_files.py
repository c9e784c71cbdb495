"""Files of calls that cost more to check than to send, and uploads that are never finished."""

import hashlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

pytestmark = pytest.mark.slow
MIB = 1 << 20
MAX_BYTES = 1_000_000  # of the tenant "small"
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}
BOUNDARY = "x" * 40
HEAD = (
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
).encode()
TAIL = f"\r\n--{BOUNDARY}--\r\n".encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    keys = folder / "keys.toml"
    limits = {"acme": "", "bravo": "", "small": f"max_bytes = {MAX_BYTES}"}
    keys.write_text(
        "\n".join(
            f'[[key]]\nname = "{name}"\ntenant = "{name}"\nscope = "admin"\n{limit}\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"'
            for name, limit in limits.items()
        )
    )
    model = save_tiny_model(folder / "model")
    with server_process(model, folder / "state", "--keys", keys) as running:
        yield running


@pytest.fixture(scope="module")
def adapter(folder: Path) -> dict[str, bytes]:
    lora = write_lora(folder / "lora", BaseSpec.of(tiny_model(), "model"))
    return {
        "config": (lora / "adapter_config.json").read_bytes(),
        "weights": (lora / "adapter_model.safetensors").read_bytes(),
    }


def client_of(server: ServerProcess, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=300)


def upload(server: ServerProcess, key: str, content: bytes) -> httpx.Response:
    with client_of(server, key) as client:
        return client.post("/v1/files", files={"file": content}, data={"purpose": "batch"})


def sent(server: ServerProcess, key: str, content: bytes) -> bytes:
    """Upload like ``upload``, without time of this process that its other threads need."""
    n_bytes = len(HEAD) + len(content) + len(TAIL)
    with begin(server, key, "POST", "/v1/files", n_bytes) as connection:
        connection.settimeout(300)
        for part in (HEAD, content, TAIL):
            connection.sendall(part)
        return answer_of(connection)


@contextmanager
def neighbour(server: ServerProcess, adapter: dict[str, bytes]) -> Iterator[dict[str, float]]:
    """Another tenant's calls during the block. Yields the longest wait for each of them."""
    longest: dict[str, float] = {}
    stop, first = threading.Event(), threading.Event()

    def ask() -> None:
        with client_of(server, "acme") as client:
            while not stop.is_set():
                for path in ("/v1/adapters/mine", "/v1/files", "/v1/models"):
                    began = time.monotonic()
                    is_put = path == "/v1/adapters/mine"
                    answer = client.put(path, files=adapter) if is_put else client.get(path)
                    assert answer.status_code in (200, 201), answer.text
                    longest[path] = max(longest.get(path, 0.0), time.monotonic() - began)
                first.set()

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield longest
            assert first.wait(300)
        finally:
            stop.set()
            asking.result()


def blank(n_bytes: int) -> bytes:
    return json.dumps(LINE).encode() + b"\n" * n_bytes


def dense(n_bytes: int) -> bytes:
    """Lines that may just be parsed: 140,000 token ids each."""
    line = json.dumps({**LINE, "body": {"prompt": [1] * 140_000}})
    n_lines = n_bytes // len(line)
    return "\n".join(line.replace('"a"', f'"{n}"', 1) for n in range(n_lines)).encode()


@pytest.mark.parametrize(
    ("content", "n_mib"),
    [
        (blank, 8),
        pytest.param(blank, 150, marks=pytest.mark.nightly),
        pytest.param(dense, 150, marks=pytest.mark.nightly),
    ],
)
@broken_only_if_each_time
def test_files_of_one_tenant_delay_no_other(
    server: ServerProcess,
    adapter: dict[str, bytes],
    content: Callable[[int], bytes],
    n_mib: int,
) -> None:
    file = content(n_mib * MIB)
    with neighbour(server, adapter) as quiet, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: upload(server, "bravo", blank(10)), range(20)))
    with neighbour(server, adapter) as attacked, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: sent(server, "bravo", file), range(4)))
    for path, longest_s in attacked.items():
        check_below(longest_s, 0.5 + 5 * max(quiet.values()), (path, quiet, attacked))
    for answer in answers:
        assert (b"line 50001: at most 50000 lines" if content is blank else b"processed") in answer
    print(f"{content.__name__} {n_mib} MiB: {quiet} → {attacked}")


def test_the_check_of_a_file_ends_when_its_client_has_left(server: ServerProcess) -> None:
    """The process that checks it stands still, and would for ever."""
    assert upload(server, "bravo", blank(10)).status_code == 200
    workers = checkers(server)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    attacker = begin(server, "bravo", "POST", "/v1/files", len(HEAD + blank(10) + TAIL))
    attacker.sendall(HEAD + blank(10) + TAIL)
    attacker.settimeout(1.0)
    with pytest.raises(TimeoutError):  # no answer
        attacker.recv(1)
    attacker.close()
    until(lambda: not set(workers) <= set(checkers(server)))
    for worker in set(workers) & set(checkers(server)):
        os.kill(worker, signal.SIGCONT)
    assert upload(server, "bravo", blank(10)).status_code == 200


def test_a_server_that_stops_tells_the_client_of_a_file_that_is_checked(tmp_path: Path) -> None:
    """The check stands still, so it outlives the time for the last answers."""
    model = save_tiny_model(tmp_path / "model")
    with server_process(model, tmp_path / "state", "--drain-timeout", "0") as stopping:
        assert upload(stopping, "any", blank(10)).status_code == 200
        for worker in checkers(stopping):
            os.kill(worker, signal.SIGSTOP)
        with begin(stopping, "any", "POST", "/v1/files", len(HEAD + blank(10) + TAIL)) as client:
            client.sendall(HEAD + blank(10) + TAIL)
            until(lambda: staged_bytes(tmp_path) > 0)
            stopping.signal()
            answer = answer_of(client)
        assert answer.startswith(b"HTTP/1.1 503"), answer
        assert b'"code":"server_draining"' in answer
        assert b"\r\nretry-after: " in answer.lower()
        assert stopping.wait() == 0


@pytest.mark.parametrize(
    ("method", "path", "head"),
    [
        ("POST", "/v1/files", HEAD),
        (
            "PUT",
            "/v1/adapters/mine",
            HEAD.replace(b'"file"', b'"weights"').replace(b"purpose", b"description"),
        ),
    ],
)
def test_unfinished_uploads_stage_no_more_than_a_tenant_may_store(
    server: ServerProcess,
    folder: Path,
    adapter: dict[str, bytes],
    method: str,
    path: str,
    head: bytes,
) -> None:
    with ExitStack() as stack:
        uploads = [
            stack.enter_context(begin(server, "small", method, path, 8 * MIB)) for _ in range(8)
        ]
        for each in uploads:
            each.sendall(head + b"\n" * (600 << 10))  # two of them are too much
        waiting = set(uploads)
        while len(waiting) > 1:  # any one may stay
            ready, _, _ = select.select(list(waiting), [], [], 60)
            assert ready
            for each in ready:
                answer = answer_of(each)
                assert answer.startswith(b"HTTP/1.1 403"), answer
                assert b"max_bytes: " in answer
                waiting.remove(each)
        assert staged_bytes(folder) <= MAX_BYTES
    until(lambda: staged_bytes(folder) == 0)
    with client_of(server, "small") as client:
        assert client.put("/v1/adapters/mine", files=adapter).status_code in (200, 201)


def test_files_and_adapters_count_together(
    server: ServerProcess, adapter: dict[str, bytes]
) -> None:
    line = {**LINE, "body": {"prompt": "x" * (MAX_BYTES - 1000)}}
    with client_of(server, "small") as client:
        client.delete("/v1/adapters/mine")
        stored = upload(server, "small", json.dumps(line).encode())
        assert stored.status_code == 200, stored.text
        for answer in (
            client.put("/v1/adapters/mine", files=adapter),
            upload(server, "small", json.dumps(line).encode()),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "quota_exceeded")
        assert client.delete(f"/v1/files/{stored.json()['id']}").status_code == 200
        assert client.put("/v1/adapters/mine", files=adapter).status_code == 201


def begin(server: ServerProcess, key: str, method: str, path: str, n_bytes: int) -> socket.socket:
    """Send the head of an upload."""
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    connection = socket.create_connection((parts.hostname, parts.port or 80), timeout=60)
    connection.sendall(
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {n_bytes}\r\n\r\n".encode()
    )
    return connection


def answer_of(connection: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"}") and (piece := connection.recv(4000)):
        answer += piece
    return answer


def checkers(server: ServerProcess) -> list[int]:
    """The processes of the server that check files."""
    found = []
    for children in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"input_file" in command:
                found.append(int(child))
    return found


def staged_bytes(folder: Path) -> int:
    n_bytes = 0
    for parent, _, names in os.walk(folder / "state"):  # what is deleted meanwhile is passed over
        for name in names if "staging" in Path(parent).parts else ():
            with suppress(FileNotFoundError):
                n_bytes += (Path(parent) / name).stat().st_size
    return n_bytes


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
