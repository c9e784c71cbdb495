"""Clocks that jump: the wall clock by a day either way, the monotonic one by an hour of sleep."""

import hashlib
import time
from collections.abc import Iterator

import httpx
import pytest

from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.settings.api_keys import parse_keys
from loraplex_server.settings.config import HttpConfig, ServerConfig
from tests.faults.conftest import World
from tests.support.adapters.lora_files import write_lora
from tests.support.servers.built_app import built_app

pytestmark = pytest.mark.anyio

_DAY_S = 86400.0


class Clocks:
    """The process's clocks, moved by as much as is said."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.monotonic_s = 0.0
        self._time, self._monotonic = time.time, time.monotonic

    def time(self) -> float:
        return self._time() + self.wall_s

    def monotonic(self) -> float:
        return self._monotonic() + self.monotonic_s


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    clocks = Clocks()
    monkeypatch.setattr(time, "time", clocks.time)
    monkeypatch.setattr(time, "monotonic", clocks.monotonic)
    yield clocks
    monkeypatch.undo()


async def _generate(world: World, **fields: object) -> httpx.Response:
    body = {"description": "to French", "probe": False, **fields}
    return await world.client.post("/v1/adapters/generate", json=body)


@pytest.mark.parametrize("jump_s", [_DAY_S, -_DAY_S])
async def test_a_jump_of_the_wall_clock_disturbs_no_answer(
    jump_s: float, clocks: Clocks, world: World
) -> None:
    await world.learn("lora")
    async with world.canary_that_runs():
        clocks.wall_s = jump_s
        await world.check_right("lora")
        folder = write_lora(world.folder / "late", world.store.base, seed=60)
        assert (await world.upload("late", folder)).status_code == 201
        job = await world.client.put("/v1/adapters/job", json={"source": "late", "wait": False})
        where = job.headers["location"]
        while (told := (await world.client.get(where)).json())["status"] == "running":
            await world.engine.unload("nothing")
        assert told["status"] == "succeeded"
    assert (await world.health())["status"] == "ok"
    await world.check_idle()


async def test_names_expire_by_the_wall_clock_and_no_others_go(
    clocks: Clocks, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.parts.makers.generated, "_clock", clocks.time)
    before = set(await world.listing())
    assert (await _generate(world, name="short", ttl_s=3600)).status_code == 201
    clocks.wall_s = -_DAY_S
    world.store.expire(clocks.time())
    assert set(await world.listing()) == {*before, "short"}, "it lives longer, and that is all"
    assert (await _generate(world, name="other", ttl_s=3600)).status_code == 201
    clocks.wall_s = 7200.0
    world.store.expire(clocks.time())
    assert set(await world.listing()) == before
    async with world.canary_that_runs():
        assert (await _generate(world, name="short", ttl_s=3600)).status_code == 201
    await world.check_idle()


async def test_an_hour_of_sleep_gives_a_key_a_minutes_worth_and_no_more(
    clocks: Clocks, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
    [[key]]
    name = "slow"
    sha256 = "{sha256}"
    scope = "infer"
    requests_per_minute = 3
    """
    # The default clock of a limiter; it stands still but for what the test says.
    frozen = (lambda: 1000.0 + clocks.monotonic_s,)
    monkeypatch.setattr(Meter.__init__, "__defaults__", frozen)
    keys = parse_keys(text.format(sha256=hashlib.sha256(b"slow-secret").hexdigest()))
    http = HttpConfig(served_model_names=("base",), api_keys=keys)
    tokenizer = world.parts.text._chat
    app = built_app(world.engine, world.store, tokenizer, ServerConfig(http=http))
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://127.0.0.1:8000",
        headers={"authorization": "Bearer slow-secret"},
    )

    async def statuses() -> list[int]:
        body = {"model": "base", "prompt": "hi", "max_tokens": 1}
        return [(await client.post("/v1/completions", json=body)).status_code for _ in range(5)]

    assert await statuses() == [200, 200, 200, 429, 429]
    clocks.wall_s = _DAY_S
    assert await statuses() == [429] * 5, "the wall clock pays for nothing"
    clocks.monotonic_s = 3600.0
    assert await statuses() == [200, 200, 200, 429, 429]
    await app.state.parts.text.close()
    app.state.parts.pools.close()
