"""SQLite that is locked, full, read-only or breaks at any statement, seen from outside."""

import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.faults.conftest import World, check_fault
from tests.support.adapters.lora_files import write_lora
from tests.support.kth_fault import KthFault

pytestmark = pytest.mark.anyio


class FailingConnection:
    """SQLite's connection; ``execute`` goes through a fault first."""

    def __init__(self, connection: sqlite3.Connection, fault: KthFault) -> None:
        self._connection = connection
        self._fault = fault

    def execute(self, *args: Any) -> sqlite3.Cursor:
        self._fault.pass_through()
        return self._connection.execute(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def _error(name: str) -> Callable[[], sqlite3.Error]:
    def make() -> sqlite3.Error:
        error = sqlite3.OperationalError("unable to use /home/secret/registry.sqlite3")
        error.sqlite_errorname = name
        return error

    return make


Act = Callable[[World, int], Awaitable[httpx.Response]]


async def _put_new(world: World, k: int) -> httpx.Response:
    return await world.upload(f"new-{k}", _source(world, 50))


async def _replace(world: World, k: int) -> httpx.Response:
    return await world.upload("lora", _source(world, 51 + k % 2))


async def _delete(world: World, k: int) -> httpx.Response:
    return await world.client.delete("/v1/adapters/oft?timeout_s=20")


async def _pin(world: World, k: int) -> httpx.Response:
    return await world.client.post("/v1/adapters/lora/pin")


async def _generate(world: World, k: int) -> httpx.Response:
    body = {"description": f"to French {k}", "probe": False}
    return await world.client.post("/v1/adapters/generate", json=body)


async def _source_job(world: World, k: int) -> httpx.Response:
    return await world.client.put(f"/v1/adapters/job-{k}", json={"source": "source-50"})


_GROWING = (_put_new, _replace, _generate, _source_job)


def _source(world: World, seed: int) -> Path:
    folder = world.folder / f"source-{seed}"
    return folder if folder.exists() else write_lora(folder, world.store.base, seed=seed)


@pytest.mark.parametrize(
    "error", ["SQLITE_FULL", pytest.param("SQLITE_IOERR_WRITE", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("act", [_put_new, _replace, _delete, _pin, _generate, _source_job])
async def test_any_failed_statement_changes_nothing_or_all(
    act: Act, error: str, world: World, samples: dict[str, Path], base_spec: BaseSpec
) -> None:
    _source(world, 50)
    fault = KthFault(_error(error))
    registry = world.store.state.registry
    registry._db = FailingConnection(registry._db, fault)  # type: ignore[assignment]
    n_failed = 0
    async with world.canary():
        for k in count():
            await world.upload("oft", samples["OFT"])
            before = await world.listing()
            fault.arm(k)
            answer = await act(world, k)
            if not fault.disarm():
                break
            if answer.is_success:  # it struck what is done behind the answer
                continue
            n_failed += 1
            check_fault(answer, "catalogue_unavailable")
            assert await world.listing() == before
            assert (await world.health())["degraded"][0]["part"] == "catalogue"
            answer = await act(world, k)
            assert answer.is_success, answer.text
            assert "degraded" not in await world.health()
    assert answer.is_success, answer.text
    assert n_failed >= 3
    await world.check_idle()
    listed = await world.listing()
    if error == "SQLITE_FULL":
        world.check_files()
    await _check_reopened(world, listed, base_spec)


async def _check_reopened(world: World, listed: dict[str, str], base: BaseSpec) -> None:
    """The next life of the server finds what was acknowledged, and no more."""
    world.store.close()
    with AdapterStore(
        world.folder / "store", base, engine=EngineHooks(world.engine.packer)
    ) as store:
        assert {card.name: card.digest for card in store.list()} == listed
        for name in listed:
            store.acquire(name).release()
        assert set(store.state.files.digests()) == set(listed.values())


async def test_a_failed_rollback_does_not_block_what_comes_after(world: World) -> None:
    """COMMIT and ROLLBACK both fail: the transaction stays open until the next write."""
    registry = world.store.state.registry
    real = registry._db

    class Broken(FailingConnection):
        def execute(self, *args: Any) -> sqlite3.Cursor:
            if args[0] in ("COMMIT", "ROLLBACK"):
                raise _error("SQLITE_IOERR_FSYNC")()
            return real.execute(*args)

    before = await world.listing()
    registry._db = Broken(real, KthFault(_error("")))  # type: ignore[assignment]
    check_fault(await _put_new(world, 1), "catalogue_unavailable")
    assert real.in_transaction
    registry._db = real
    assert await world.listing() == before
    assert (await _put_new(world, 1)).is_success
    assert {*before, "new-1"} == set(await world.listing())


@contextmanager
def _locked(world: World) -> Iterator[None]:
    """Somebody else writes: an operator's shell, a backup."""
    world.store.state.registry._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(world.folder / "store" / "registry.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


@contextmanager
def _full(world: World) -> Iterator[None]:
    db = world.store.state.registry._db
    (n_pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {n_pages}")
    _fill(db)
    yield
    db.execute("PRAGMA max_page_count = 1000000")


def _fill(db: sqlite3.Connection) -> None:
    """Takes the space that is left in the pages there are, as other adapters would."""
    number = 0
    for size in (2000, 200, 20):
        while True:
            number += 1
            try:
                db.execute("INSERT INTO reports VALUES (?, ?)", (f"filler-{number}", "x" * size))
            except sqlite3.OperationalError:
                break


@contextmanager
def _read_only(world: World) -> Iterator[None]:
    db = world.store.state.registry._db
    db.execute("PRAGMA query_only = ON")
    yield
    db.execute("PRAGMA query_only = OFF")


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (_locked, "locked by another process"),
        (_full, "no space left on device"),
        (_read_only, "read-only"),
    ],
)
async def test_a_catalogue_that_cannot_be_written_still_serves_and_says_so(
    state: Callable[[World], Any], problem: str, world: World
) -> None:
    await world.learn("lora")
    _source(world, 50)
    before, counted = await world.listing(), await world.count("catalogue")
    async with world.canary():
        with state(world):
            # A delete, or a flag, may well find room on a full disk.
            for act in _GROWING if state is _full else (*_GROWING, _delete, _pin):
                answer = await act(world, 0)
                check_fault(answer, "catalogue_unavailable")
                assert problem in answer.text
                assert await world.listing() == before
            await world.forget("lora")
            await world.check_right("lora")
            (part,) = (await world.health())["degraded"]
            assert (part["part"], part["problem"]) == ("catalogue", problem)
            assert await world.count("catalogue") == counted + part["failures"]
            assert part["failures"] >= len(_GROWING)
        assert (await _put_new(world, 0)).is_success
        assert (await world.health())["status"] == "ok"
    await world.check_idle()
    world.check_files()
