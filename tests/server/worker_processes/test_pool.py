import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

import pytest

from loraplex_server.errors import ApiError
from loraplex_server.worker_processes.pool import (
    CallFailed,
    CallRaised,
    CallTooLarge,
    CallTooLong,
    CallTooSlow,
    WorkerProcesses,
    WorkersBusy,
)
from tests.support import worker_calls as calls

SHORT_S, LONG_S = 1.0, 60.0
T = TypeVar("T")


def test_a_call_returns_its_result_and_workers_are_kept() -> None:
    async def use(workers: WorkerProcesses) -> None:
        assert await workers.run(calls.doubled, ["ab"], timeout_s=LONG_S) == "abab"
        first = await workers.run(calls.nap, [0], timeout_s=LONG_S)
        assert first != os.getpid()
        assert await workers.run(calls.nap, [0], timeout_s=LONG_S) == first

    _with_workers(use)


def test_a_worker_imports_little_and_sees_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEYS", "secret")

    async def use(workers: WorkerProcesses) -> None:
        loaded = await workers.run(calls.modules, [], timeout_s=LONG_S)
        assert not {"torch", "transformers", "numpy", "asyncio", "fastapi"} & set(loaded)
        assert "secret" not in str(await workers.run(calls.environment, [], timeout_s=LONG_S))

    _with_workers(use)


@pytest.mark.parametrize(
    ("function", "args", "error"),
    [
        (calls.nap, [LONG_S], CallTooSlow),
        (calls.burn, [1], CallTooLong),
        (calls.allocate, [10 << 30], CallTooLarge),
        (calls.deep, [0], CallRaised),
        (calls.long, [20 << 20], CallTooLarge),
        (calls.crash, [], CallTooLarge),
        (calls.fail, ["why"], CallRaised),
    ],
)
def test_a_hostile_call_fails_alone(
    function: Callable[..., object], args: list[object], error: type[CallFailed]
) -> None:
    async def use(workers: WorkerProcesses) -> None:
        hostile = asyncio.create_task(workers.run(function, args, timeout_s=SHORT_S))
        assert await workers.run(calls.doubled, ["ab"], timeout_s=LONG_S) == "abab"
        with pytest.raises(error):
            await hostile
        assert await workers.run(calls.doubled, ["ab"], timeout_s=LONG_S) == "abab"

    _with_workers(use)


def test_cpu_of_all_threads_of_a_call_is_limited() -> None:
    """Each call has its own allowance, though the process's clock goes on."""

    async def use(workers: WorkerProcesses) -> None:
        await workers.run(calls.nap, [0], timeout_s=LONG_S)
        with pytest.raises(CallFailed):
            await workers.run(calls.burn, [4], timeout_s=2)

    _with_workers(use)


def test_only_a_calls_own_processor_time_counts_against_its_limit() -> None:
    """On a loaded machine a call waits, which is as good as a nap."""

    async def use(workers: WorkerProcesses) -> None:
        assert await workers.run(calls.nap, [SHORT_S], timeout_s=LONG_S, cpu_s=0.0)
        with pytest.raises(CallTooLong, match="CPU time") as spent:
            await workers.run(calls.burn, [1], timeout_s=LONG_S, cpu_s=0.0)
        assert not isinstance(spent.value, CallTooSlow)

    _with_workers(use)


def test_a_worker_prepares_before_its_first_call_and_without_its_limits() -> None:
    async def use(workers: WorkerProcesses) -> None:
        workers.start()
        count = await workers.run(calls.n_prepared, [], timeout_s=LONG_S, cpu_s=0.0)
        again = await workers.run(calls.n_prepared, [], timeout_s=LONG_S, cpu_s=0.0)
        assert (count, again) == (1, 1)

    _with_workers(use, prepare=(calls.prepared, [1.5]))


def test_a_cancelled_call_frees_its_worker() -> None:
    async def use(workers: WorkerProcesses) -> None:
        held = [
            asyncio.create_task(_called(workers, f"t{number}", calls.nap, LONG_S))
            for number in range(4)  # two run, two wait
        ]
        await asyncio.sleep(0)
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert await workers.run(calls.doubled, ["ab"], timeout_s=LONG_S) == "abab"

    _with_workers(use)


def test_waiting_is_bounded_in_number_and_time() -> None:
    async def use(workers: WorkerProcesses) -> None:
        held = [
            asyncio.create_task(_called(workers, tenant, calls.nap, LONG_S))
            for tenant in ("acme", "umbra", "umbra")  # two run, one waits
        ]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="1 calls of this tenant wait") as full:
            await _called(workers, "umbra", calls.doubled, "ab")
        assert (full.value.status, full.value.code) == (429, "queue_full")
        with pytest.raises(WorkersBusy, match=r"no worker process was free for 0\.2 s"):
            await held[2]
        for task in held[:2]:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    _with_workers(use, max_waiting=1, max_wait_s=0.2)


def test_a_tenant_has_one_turn_and_leaves_a_process_to_others() -> None:
    async def use(workers: WorkerProcesses) -> None:
        naps = [asyncio.create_task(_called(workers, "acme", calls.nap, LONG_S)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await _called(workers, "umbra", calls.doubled, "ab") == "abab"
        with pytest.raises(WorkersBusy, match="free for 1 s"):
            await naps[1]
        naps[0].cancel()
        await asyncio.gather(*naps, return_exceptions=True)
        assert await _called(workers, "acme", calls.doubled, "ab") == "abab"

    _with_workers(use, max_wait_s=1.0)


async def _called(
    workers: WorkerProcesses, tenant: str, function: Callable[[T], object], argument: T
) -> object:
    async with workers.turn_of(tenant):
        return await workers.run(function, [argument], timeout_s=LONG_S)


def _with_workers(use: Callable[[WorkerProcesses], object], **options: float) -> None:
    async def run() -> None:
        workers = WorkerProcesses("calls", **options)  # type: ignore[arg-type]
        try:
            await use(workers)  # type: ignore[misc]
        finally:
            await workers.close()

    asyncio.run(run())
