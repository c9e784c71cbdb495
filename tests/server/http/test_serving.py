"""`loraplex serve` as a process: overload, signals, and starts that are refused."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.asgi_call import events_of
from tests.support.server_process import failing_start, save_tiny_model, server_process

LONG = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def first_event(lines: Iterator[str]) -> str:
    return next(line for line in lines if line.startswith("data: "))


def test_a_full_queue_is_429_and_sigterm_lets_running_streams_finish(
    model: Path, tmp_path: Path
) -> None:
    flags = ("--max-batch-size", "1", "--max-queue", "1", "--log-format", "json")
    with (
        server_process(model, tmp_path, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
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
        assert server.wait(5) == 1
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
