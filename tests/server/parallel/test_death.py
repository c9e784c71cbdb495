"""A process of the engine that dies takes the engine with it, and nobody waits for an answer."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.parallel.shard_workers import ShardWorkers
from loraplex_server.engine.steps.model_runner import ModelRunner, StartedStep
from tests.server.parallel.conftest import LIMITS, PROMPT, ask
from tests.support.servers.server_process import save_tiny_model, server_process
from tests.vectors.conftest import serving

pytestmark = pytest.mark.anyio

DEAD_S = 15  # at once on a quiet machine; the ranks would wait for each other for minutes


def workers_of(engine: Engine) -> ShardWorkers:
    others = engine.loop.adapters._others
    assert isinstance(others, ShardWorkers)
    return others


async def until_dead(client: httpx.AsyncClient) -> None:
    while (await client.get("/health")).status_code == 200:
        await asyncio.sleep(0)


@pytest.mark.slow
@pytest.mark.parametrize("n_running", [2, pytest.param(0, marks=pytest.mark.nightly)])
async def test_a_dead_rank_is_a_dead_engine_at_once(
    n_running: int, base: Path, tmp_path: Path
) -> None:
    async with serving(base, tmp_path, tensor_parallel_size=2, **LIMITS) as server:
        await ask(server, None)
        long = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
        running = [
            asyncio.create_task(server.post("/v1/completions", **long)) for _ in range(n_running)
        ]
        while server.engine.stats().n_running < n_running:
            await asyncio.sleep(0)
        process = workers_of(server.engine)._workers[0].process
        process.kill()
        async with asyncio.timeout(DEAD_S):
            await until_dead(server.client)
            answers = [await one for one in running]
        for answer in (*answers, await server.post("/v1/completions", prompt=PROMPT)):
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "engine_dead"
        assert process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
async def test_a_step_that_breaks_off_on_rank_0_ends_the_engine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank would be somewhere else in the layers: no request is tried again."""
    async with serving(base, tmp_path, tensor_parallel_size=2, **LIMITS) as server:
        await ask(server, None)
        model = server.engine.loop.runner._model

        def fail(_: object) -> Any:
            raise MemoryError("no room")

        monkeypatch.setattr(model, "fused", fail)
        async with asyncio.timeout(60):
            answer = await server.post("/v1/completions", prompt=PROMPT)
            await until_dead(server.client)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        assert workers_of(server.engine)._workers[0].process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
async def test_tokens_of_a_step_that_a_rank_died_in_are_not_answered(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's sums are aborted behind the host's back: tokens are there, and mean nothing."""
    async with serving(base, tmp_path, tensor_parallel_size=2, **LIMITS) as server:
        await ask(server, None)
        workers, start = workers_of(server.engine), ModelRunner.start

        def started(self: ModelRunner, *args: Any) -> StartedStep:
            step = start(self, *args)
            workers._workers[0].process.kill()
            workers._watchers[0].join()  # it has been seen
            return step

        monkeypatch.setattr(ModelRunner, "start", started)
        async with asyncio.timeout(60):
            answer = await server.post("/v1/completions", prompt=PROMPT, max_tokens=1)
            await until_dead(server.client)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "engine_dead"


async def test_a_rank_that_cannot_load_stops_the_start(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_server.engine.parallel import shard_workers
    from loraplex_server.model.errors import ModelError

    monkeypatch.setattr(shard_workers, "_MODULE", "loraplex_server.no_such_module")
    with pytest.raises(ModelError, match="rank 1 ended while it loaded"):
        async with serving(base, tmp_path, tensor_parallel_size=2, **LIMITS):
            pass


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # whose new parent has not looked yet


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.nightly) for n in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_no_process_stays_behind_a_server(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C let a running answer end first."""
    model = save_tiny_model(tmp_path / "base")
    with server_process(model, tmp_path / "state", "--tensor-parallel-size", "2") as server:
        ranks = [
            pid
            for pid in children_of(server.process.pid)
            if b"shard_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(ranks) == 1
        body = {"prompt": "hi", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.signal(number)
            if number is not signal.SIGKILL:
                assert list(filter(None, lines))[-1] == "data: [DONE]"
        assert server.wait(120) == (-signal.SIGKILL if number is signal.SIGKILL else 0)
        deadline = time.monotonic() + 60
        while any(map(is_running, ranks)):
            assert time.monotonic() < deadline, "a process stayed"
