"""`loraplex serve` as a process: overload, signals, and starts that are refused."""

import gc
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from loraplex_server.launch import freeze_gc
from tests.support.servers.asgi_call import events_of
from tests.support.servers.server_process import (
    ServerProcess,
    failing_start,
    save_tiny_model,
    server_process,
)

LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def first_event(lines: Iterator[str]) -> str:
    return next(line for line in lines if line.startswith("data: "))


@pytest.fixture(scope="module")
def narrow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with room for one running and one waiting request."""
    flags = ("--max-batch-size", "1", "--max-queue", "1", "--log-format", "json")
    state, temporary = tmp_path_factory.mktemp("narrow"), tmp_path_factory.mktemp("temporary")
    environment = {"TMPDIR": str(temporary)}
    with server_process(  # as users start it
        model, state, *flags, warm=False, environment=environment
    ) as server:
        yield server
    assert list(temporary.iterdir()) == []  # although it was killed


def trial_process(server: ServerProcess) -> str:
    """The command line of the process that tries grammars, once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for children in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
            for child in children.read_text().split():
                command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if "grammar_trial" in command:
                    return command
        time.sleep(0.05)
    raise AssertionError("no process for grammars was started")


def test_a_server_makes_ready_for_grammars_before_one_is_asked_for(narrow: ServerProcess) -> None:
    """llguidance's form of the tokenizer takes seconds on a loaded machine."""
    assert "/dev/fd/" in trial_process(narrow)
    with httpx.Client(base_url=narrow.url, timeout=60) as client:
        body = {"prompt": "x", "guided_choice": ["fine"]}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "fine"


def test_clients_that_vanish_or_crawl_leave_nothing_behind(narrow: ServerProcess) -> None:
    server = narrow
    with httpx.Client(base_url=server.url, timeout=60) as client:
        port = httpx.URL(server.url).port
        assert port is not None
        body = b'{"prompt": "x", "max_tokens": 500, "ignore_eos": true, "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        files = Path(f"/proc/{server.process.pid}/fd")
        trial_process(server)
        client.get("/health")
        n_before = len(list(files.iterdir()))
        for beginning in (b"", head[:20], head, head + body[:10], head + body):
            crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
            for connection in crowd:
                connection.sendall(beginning)
            for connection in crowd:
                connection.close()
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(head + body)
        slow.shutdown(socket.SHUT_WR)  # half-closed: counts as gone
        slow.recv(1)
        slow.close()
        idle = 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0'
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (
            len(list(files.iterdir())) > n_before or idle not in client.get("/metrics").text
        ):
            time.sleep(0.05)
        assert len(list(files.iterdir())) <= n_before
        assert client.post("/v1/completions", json={"prompt": "y", "max_tokens": 4}).is_success
        assert client.get("/health").is_success
        assert "Traceback" not in server.log


def test_a_full_queue_is_429_and_sigterm_lets_running_streams_finish(
    narrow: ServerProcess,
) -> None:
    server = narrow
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {**LONG, "max_tokens": 800, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            first_event(lines)
            with ThreadPoolExecutor(5) as pool:
                short = {"prompt": "y", "max_tokens": 1}
                asked = list(
                    pool.map(lambda _: client.post("/v1/completions", json=short), range(5))
                )
                statuses = sorted(answer.status_code for answer in asked)
                assert statuses == [200, 429, 429, 429, 429]
                refused = next(answer for answer in asked if answer.status_code == 429)
                assert int(refused.headers["retry-after"]) >= 1
            # The queue let its one waiting request through only after the long one ended.
        with client.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            first_event(lines)
            server.signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                pass
            refused = client.post("/v1/completions", json=short)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            *_, usage, done = events_of("\n\n".join(x for x in lines if x).encode())
        assert done == "[DONE]"
        assert usage["usage"]["completion_tokens"] == 800
        assert server.wait() == 0
        assert "Traceback" not in server.log
        assert '"status":429' in server.log


def test_ctrl_c_ends_what_outlives_the_drain_timeout_with_an_error_event(
    model: Path, tmp_path: Path
) -> None:
    with (
        server_process(model, tmp_path, "--drain-timeout", "0.1") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=LONG) as running,
    ):
        lines = running.iter_lines()
        first_event(lines)
        server.signal(signal.SIGINT)
        *_, error, done = events_of("\n\n".join(x for x in lines if x).encode())
        assert done == "[DONE]"
        assert error["error"]["code"] == "server_draining"
        assert server.wait() == 0
        assert "Traceback" not in server.log
        assert "leaked" not in server.log  # by nanobind, of what no collection has seen
        assert server.log.splitlines()[-1].endswith("stopped")


def test_a_second_signal_stops_at_once(model: Path, tmp_path: Path) -> None:
    with (
        server_process(model, tmp_path, "--drain-timeout", "60") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=LONG) as running,
    ):
        first_event(running.iter_lines())
        server.signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            pass
        server.signal(signal.SIGTERM)
        assert server.wait(20) == 1  # far less than the drain timeout
        assert "Traceback" not in server.log


def test_starts_that_cannot_work_are_refused_in_one_line(tmp_path: Path) -> None:
    status, log = failing_start("--host", "0.0.0.0")
    assert status == 1
    assert "--api-key" in log
    assert "Traceback" not in log
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, log = failing_start("--port", str(taken.getsockname()[1]))
    assert status == 1
    assert "choose another --port" in log
    assert "Traceback" not in log
    config = tmp_path / "bad.yaml"
    config.write_text("max-batch-size: none\n")
    status, log = failing_start("--config", config)
    assert status == 1
    assert "max-batch-size" in log


def test_what_is_there_at_the_start_is_not_collected_again() -> None:
    before = gc.get_freeze_count()
    freeze_gc()
    assert gc.get_freeze_count() > before
    assert len(gc.get_objects()) < 1000


def test_a_server_may_open_files_for_all_its_connections() -> None:
    """The usual soft limit of 1024 would keep new connections out before an old one is closed."""
    code = (
        "import resource as r; from loraplex_server.listening import allow_open_files\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (200, hard))\n"
        "allow_open_files(300); print(r.getrlimit(r.RLIMIT_NOFILE)[0])\n"
        "allow_open_files(250); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["300", "300"]
