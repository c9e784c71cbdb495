"""Permits and threads that tenants share: who goes first, and what a full queue costs."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from loraplex_server.errors import ApiError
from loraplex_server.tenant_shares import TenantShares, TenantThreads

pytestmark = pytest.mark.anyio


class Calls:
    """Calls that hold a permit until they are told to end."""

    def __init__(self, shares: TenantShares) -> None:
        self._shares = shares
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def send(self, *names: str) -> None:
        """Start calls, whose tenant is the letter of their name."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._call(name))
            await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)

    async def close(self) -> None:
        for name in self._tasks:
            await self.leave(name)

    async def _call(self, name: str) -> None:
        await self._shares.acquire(name[0])
        try:
            self.begun.append(name)
            await self._ends[name].wait()
        finally:
            self._shares.release(name[0])


@pytest.fixture
async def one() -> AsyncIterator[Calls]:
    calls = Calls(TenantShares("calls", 1, 1, max_waiting=3))
    yield calls
    await calls.close()


async def test_a_tenants_call_waits_for_one_call_of_each_other_tenant(one: Calls) -> None:
    await one.send("a1", "a2", "a3", "b1", "b2", "c1")
    for name in ("a1", "b1", "c1", "a2", "b2"):
        assert one.begun[-1] == name
        await one.end(name)
    assert one.begun[-1] == "a3"


async def test_a_tenant_that_comes_late_goes_before_the_next_call_of_the_last_one(
    one: Calls,
) -> None:
    await one.send("a1", "a2", "a3")
    await one.end("a1")
    await one.send("b1")
    await one.end("a2")
    assert one.begun == ["a1", "a2", "b1"]


async def test_permits_of_one_tenant_are_limited_and_the_one_with_fewest_goes_first() -> None:
    calls = Calls(TenantShares("calls", 3, 2))
    await calls.send("a1", "a2", "a3", "b1", "b2", "c1")
    assert calls.begun == ["a1", "a2", "b1"]
    await calls.end("a1")
    assert calls.begun[-1] == "c1"  # a and b hold one each
    await calls.end("c1")
    assert calls.begun[-1] == "a3"  # a's last permit is older than b's
    await calls.close()


async def test_who_leaves_holds_nothing(one: Calls) -> None:
    await one.send("a1", "a2", "b1", "b2")
    await one.leave("b1")  # while it waits
    await one.leave("a1")  # while it runs
    assert one.begun[-1] == "b2"
    await one.leave("a2")
    await one.end("b2")
    await one.send("b3")
    assert one.begun == ["a1", "b2", "b3"]


async def test_a_call_that_leaves_as_its_turn_comes_passes_it_on(one: Calls) -> None:
    await one.send("a1", "b1", "c1")
    one._ends["a1"].set()
    await asyncio.sleep(0)  # a1 has released its permit to b1, which has not run
    await one.leave("b1")
    await asyncio.sleep(0)
    assert one.begun == ["a1", "c1"]


async def test_only_the_queue_of_a_tenant_itself_is_ever_full(one: Calls) -> None:
    await one.send("a1", "a2", "a3", "a4")
    with pytest.raises(ApiError, match="3 calls of this tenant wait") as full:
        await one._shares.acquire("a")
    assert (full.value.status, full.value.code) == (429, "queue_full")
    await one.send("b1")
    await one.end("a1")
    assert one.begun[-1] == "b1"


async def test_a_thread_is_held_until_its_work_ends_even_if_the_caller_has_left() -> None:
    threads = TenantThreads("tests", 1, 1)
    may_end, running = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert may_end.wait(60)

    left = asyncio.create_task(threads.run("a", hold))
    while not running.is_set():
        await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    waiting = asyncio.create_task(threads.run("b", lambda: may_end.is_set()))
    await asyncio.sleep(0)
    may_end.set()
    assert await waiting
    with pytest.raises(ZeroDivisionError):
        await threads.run("a", lambda: 1 / 0)
    threads.close()
    with pytest.raises(asyncio.CancelledError):
        await threads.run("a", lambda: None)
