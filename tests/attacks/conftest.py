"""A real server process under attack, and what a bystander sees of it meanwhile."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.bounds import check_below
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

STALL_S = 2.0  # attacks that worked stalled everybody for longer
_PAUSE_S = 0.005  # between two looks, which would take a core without it


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("attacked")
    with server_process(save_tiny_model(folder / "model"), folder / "state") as running:
        yield running


def connect(server: ServerProcess, *, receive_bytes: int | None = None) -> socket.socket:
    """``receive_bytes``: of answers that the kernel takes for a client that does not read."""
    parts = urlsplit(server.url)
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(60)
    client.connect((parts.hostname, parts.port))
    return client


class Bystander:
    """Reads ``path`` again and again; remembers the longest wait."""

    def __init__(self, url: str, path: str, key: str) -> None:
        self._url = url
        self._path = path
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._stop = threading.Event()
        self.first = threading.Event()  # the first answer is there
        self.longest_s = 0.0
        self.n_answers = 0

    def run(self) -> None:
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=60) as client:
            while not self._stop.wait(_PAUSE_S):
                began = time.monotonic()
                assert client.get(self._path).status_code == 200
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.n_answers += 1
                self.first.set()

    def stop(self) -> None:
        self._stop.set()


@contextmanager
def bystander(url: str, path: str = "/health", key: str = "") -> Iterator[Bystander]:
    """Watches during the block; raises TooSlow if it ever waited as long as ``STALL_S``."""
    watcher = Bystander(url, path, key)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    assert watcher.first.wait(60)
    try:
        yield watcher
    finally:
        watcher.stop()
        thread.join()
    check_below(watcher.longest_s, STALL_S, path)


@contextmanager
def stream(
    url: str, adapter: str | None = None, key: str = "", max_tokens: int = 3000
) -> Iterator[list[float]]:
    """A stream of many tokens that began before the block. Yields the gaps in it, in seconds.

    It is read until it ends or the block does.
    """
    body = {
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
        "adapter": adapter,
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    gaps: list[float] = []
    began, stop = threading.Event(), threading.Event()

    def read() -> None:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60
        ) as answer:
            assert answer.status_code == 200
            last = time.monotonic()
            for line in answer.iter_lines():
                now = time.monotonic()
                if line.startswith("data: {"):
                    gaps.append(now - last)
                    last = now
                    began.set()
                if stop.is_set():
                    return

    thread = threading.Thread(target=read)
    thread.start()
    assert began.wait(60)
    try:
        yield gaps
    finally:
        stop.set()
        thread.join()


def cpu_s(server: ServerProcess) -> float:
    """Processor time that the server has used, of all its threads."""
    return _cpu_s(server, 11)


def children_cpu_s(server: ServerProcess) -> float:
    """Processor time of the processes that the server has started and that have ended."""
    return _cpu_s(server, 13)


def _cpu_s(server: ServerProcess, user_field: int) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[user_field]) + int(fields[user_field + 1])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(server: ServerProcess) -> int:
    """Resident memory of the server process."""
    return _status_bytes(server, "VmRSS:")


@contextmanager
def peak_memory(server: ServerProcess, *, below_bytes: int) -> Iterator[None]:
    """Fails if resident memory ever grows by so much in the block."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts from now
    before = memory_bytes(server)
    yield
    assert _status_bytes(server, "VmHWM:") - before < below_bytes


def _status_bytes(server: ServerProcess, field: str) -> int:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field}")
