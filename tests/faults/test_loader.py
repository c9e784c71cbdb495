"""Allocations and copies on an adapter's way to the device, each of which fails once."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from loraplex_server.engine.adapters.adapter_loader import AdapterLoader
from loraplex_server.engine.adapters.adapter_memory import AdapterMemory
from tests.faults.conftest import FAMILIES, World, check_fault
from tests.support.kth_fault import KthFault

pytestmark = pytest.mark.anyio

_MESSAGE = "DefaultCPUAllocator: not enough memory at /home/secret.cpp"
_ERRORS: list[Callable[[], BaseException]] = [lambda: RuntimeError(_MESSAGE), MemoryError]


def _everywhere(world: World, fault: KthFault, patch: pytest.MonkeyPatch) -> None:
    """Every tensor operation from disk to the tables that the kernels read."""
    pool = world.engine.loop.adapters
    patch.setattr(world.store.loader, "load", fault.within(world.store.loader.load))
    patch.setattr(pool, "_start_load", fault.within(pool._start_load))  # engine thread
    patch.setattr(AdapterMemory, "copy", fault.within(AdapterMemory.copy))  # loader thread
    patch.setattr(pool, "_publish", fault.within(pool._publish))  # engine thread


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.nightly) if f in ("MOLA", "OFT") else f for f in FAMILIES],
)
async def test_any_failed_allocation_or_copy_fails_its_request_alone(
    family: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = family.lower()
    await world.learn(adapter)
    fault = KthFault(_ERRORS[FAMILIES.index(family) % 2])
    _everywhere(world, fault, monkeypatch)
    async with world.canary():
        for _ in fault.each_k():
            await world.forget(adapter)
            answer = await world.ask(adapter)
            if answer.status_code == 200:
                assert answer.json()["choices"] == world.expected[adapter]
            else:
                check_fault(answer, "adapter_load_failed", "out_of_memory", "engine_error")
                await world.check_right(adapter)
    await world.check_idle()
    assert world.engine.alive


@pytest.mark.parametrize("seam", ["reserve_group", "reserve_tensors", "fill", "publish"])
async def test_a_pool_that_fails_for_one_adapter_serves_the_next(
    seam: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.learn("mola")
    fault = KthFault(lambda: RuntimeError("CUDA error: an illegal address in /dev/secret"))
    pool = world.engine.loop.adapters.pool
    monkeypatch.setattr(pool, seam, fault.before(getattr(pool, seam)))
    async with world.canary():
        for _ in fault.each_k():
            await world.forget("mola")
            answer = await world.ask("mola")
            if answer.status_code != 200:
                check_fault(answer, "adapter_load_failed")
                assert answer.status_code == 503
            await world.check_right("mola")
    await world.check_idle()


class _SeenLate(Future[Any]):
    """A load that may be done at any moment: the first ``n`` looks do not see it yet."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n_left = n

    def done(self) -> bool:
        self._n_left -= 1
        return super().done() and self._n_left < 0


async def test_a_load_may_end_between_any_two_looks_at_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that ends between two looks is published, so the base does not answer instead."""
    await world.learn("lora")
    submit = AdapterLoader.submit
    for n in range(8):
        seen = _SeenLate(n)

        def submit_late(loader: AdapterLoader, *args: Any, seen: _SeenLate = seen) -> Future[Any]:
            load = submit(loader, *args)
            load.add_done_callback(lambda load: seen.set_result(load.result()))
            return seen

        async with world.canary():  # steps go on, each looks
            with monkeypatch.context() as patch:
                patch.setattr(AdapterLoader, "submit", submit_late)
                await world.forget("lora")
                await world.check_right("lora")
        assert seen._n_left < 0
    await world.check_idle()


async def test_a_failed_load_whose_client_has_left_is_no_error_of_the_next_request(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client leaves while the copy runs; then the copy fails."""
    await world.learn("lora")
    await world.forget("lora")
    before = world.health_tracker.counts["loader"]
    loop = asyncio.get_running_loop()
    copying, left = asyncio.Event(), asyncio.Event()

    def fails_late(*_: object) -> None:
        loop.call_soon_threadsafe(copying.set)
        asyncio.run_coroutine_threadsafe(left.wait(), loop).result()
        raise RuntimeError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterMemory, "copy", fails_late)
        asking = asyncio.create_task(world.ask("lora"))
        await copying.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await world.check_no_requests()
        left.set()
        while world.health_tracker.counts["loader"] == before:
            await world.engine.unload("nothing")
    await world.check_right("lora")
    await world.check_idle()


async def test_a_loader_that_keeps_failing_shows_in_health_until_it_works_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.learn("lora")
    counted = await world.count("loader")

    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterMemory, "copy", broken)
        for n in (1, 2, 3):
            await world.forget("lora")
            check_fault(await world.ask("lora"), "adapter_load_failed")
            told = await world.health()
            assert told["status"] == ("ok" if n < 3 else "degraded")
    (part,) = told["degraded"]
    assert part["part"] == "loader"
    assert part["failures"] == 3
    assert part["problem"] == "out of memory"
    assert abs(part["since"] - time.time()) < 600
    assert await world.count("loader") == counted + 3
    await world.check_right("lora")
    assert (await world.health())["status"] == "ok"
    assert await world.count("loader") == counted + 3


async def test_where_every_place_is_pinned_a_request_hears_it_while_they_are_busy(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for ever: busy adapters that are pinned never make room."""
    pool = world.engine.loop.adapters
    names = ("lora", "mola", "oft")
    for name in (*names, "canary"):
        await world.forget(name)
    await world.forget("prefix_tuning")
    assert (await world.ask("lora")).status_code == 200
    digest = world.store.get("lora").digest
    world.engine.set_pinned(digest, True)
    try:
        monkeypatch.setattr(pool.pool, "n_slots", max(pool.pool.slots) + 1)
        busy = asyncio.create_task(world.ask("lora", max_tokens=150))
        while not world.engine.stats().n_running:
            await world.engine.unload("nothing")
        refused = await world.ask("oft")
        assert not busy.done()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "adapter_memory_full"
        assert "pinned" in refused.text
        assert (await busy).status_code == 200
    finally:
        world.engine.set_pinned(digest, False)
