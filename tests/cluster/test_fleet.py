"""What a fleet promises: answers of one process, adapters that stay, names, and a death."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import ADMIN, N_UNUSED
from tests.cluster.streams import (
    CHAT,
    chat,
    connect,
    engines_of,
    keep_asking,
    lines_of,
    stream,
    taken_by,
    wrong,
)
from tests.cluster.whole_answers import answers, body_of
from tests.support.servers.cluster_process import ClusterProcess
from tests.support.servers.server_process import ServerProcess

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.anyio]

NAMES = [None, *(f"a{number}" for number in range(16))]
WANTED_STICKINESS = 0.85
BACK_S = 10.0  # from a death to the next answer, on a machine with a core for each process
N_BUSY = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others work, too


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def test_sixteen_adapters_and_the_base_answer_as_in_one_process(
    cluster: ClusterProcess, single: ServerProcess
) -> None:
    bodies = [body_of(name) for name in NAMES]
    ours, theirs = answers(cluster.url, bodies), answers(single.url, bodies)
    for name, one, other in zip(NAMES, ours, theirs, strict=True):
        assert one[0] == other[0], name
        assert one[2] == other[2]
    assert len({json.dumps(choices) for choices, _, _ in ours}) == len(NAMES)  # each does something


async def test_requests_stay_with_the_replica_of_their_adapter(cluster: ClusterProcess) -> None:
    """Counted by replica: eight adapters, four at home on each, one stream of each at any time."""
    n_rounds = 12
    async with connect(cluster) as client:
        found = [f"s{number}" for number in range(N_UNUSED)]
        before = await taken_by(client, found)
        for name in found:  # alone: each goes to its home
            assert not wrong([await stream(client, chat(name, 2))], 2)
        homes = await _homes(client, found, before)
        by_home: dict[str, list[str]] = {}
        for name, home in homes.items():
            by_home.setdefault(home, []).append(name)
        assert min(map(len, by_home.values())) >= 4, by_home
        names = [name for group in by_home.values() for name in group[:4]]
        start = await taken_by(client, names)

        async def user(name: str) -> None:
            for _ in range(n_rounds):
                assert not wrong([await stream(client, chat(name, 8))], 8)

        await asyncio.gather(*map(user, names))
        end = await taken_by(client, names)
    n_taken = sum(sum(end[n].values()) - sum(start[n].values()) for n in names)
    assert n_taken == n_rounds * len(names)
    at_home = sum(end[name][homes[name]] - start[name].get(homes[name], 0) for name in names)
    stickiness = at_home / (n_rounds * len(names))
    print(f"{stickiness:.2f} of {n_rounds * len(names)} requests met their adapter's home")
    assert stickiness >= WANTED_STICKINESS


async def _homes(
    client: httpx.AsyncClient, names: list[str], before: dict[str, dict[str, int]]
) -> dict[str, str]:
    """The replica that took the one request of each adapter since ``before``."""
    now = await taken_by(client, names)
    homes = {}
    for name in names:
        rose = [r for r, count in now[name].items() if count > before[name].get(r, 0)]
        assert len(rose) == 1, (name, now[name], before[name])
        homes[name] = rose[0]
    assert len(set(homes.values())) == 2
    return homes


async def test_of_several_replacements_at_once_one_wins(
    cluster: ClusterProcess, world: Path
) -> None:
    async with connect(cluster) as client:
        first = await client.put("/v1/adapters/mine", files=upload(world, 1))
        assert first.status_code == 201, first.text
        seen = {"If-Match": first.headers["etag"]}
        changes = [
            client.put("/v1/adapters/mine", files=upload(world, number), headers=seen)
            for number in range(2, 8)
        ]
        statuses = Counter(answer.status_code for answer in await asyncio.gather(*changes))
        assert statuses == {200: 1, 412: 5}
        gone = await client.delete("/v1/adapters/mine")
        assert gone.status_code == 200, gone.text
        again = [(await client.post(CHAT, json=chat("mine"))).status_code for _ in range(4)]
        assert again == [404] * 4  # at whichever gateway


async def test_an_adapter_leaves_the_memory_of_all_processes_and_of_none_that_use_it(
    cluster: ClusterProcess,
) -> None:
    path, bodies = "/v1/adapters/a9", [body_of("a9")] * 8
    before = await asyncio.to_thread(answers, cluster.url, bodies, n_at_once=8)
    async with connect(cluster) as client:
        async with client.stream("POST", CHAT, json=chat("a9", 2000)) as running:
            lines = lines_of(running)
            await anext(lines)
            refused = [await client.post(f"{path}/unload") for _ in range(4)]
            codes = {(a.status_code, a.json()["error"]["code"]) for a in refused}
            assert codes == {(409, "adapter_in_use")}  # at whichever gateway
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        unloaded = await client.post(f"{path}/unload")
        assert unloaded.status_code == 200, unloaded.text
        card = unloaded.json()
        assert (card["tier"], card["n_bytes"]["host"], card["n_bytes"]["device"]) == ("disk", 0, 0)
        held = {a["digest"] for engine in await engines_of(client) for a in engine["adapters"]}
        assert card["digest"] not in held
        cards = [(await client.get(path)).json() for _ in range(8)]
        assert {card["n_bytes"]["host"] for card in cards} == {0}
    after = await asyncio.to_thread(answers, cluster.url, bodies, n_at_once=8)
    assert [choices for choices, _, _ in after] == [choices for choices, _, _ in before]


async def test_a_killed_replica_ends_only_streams_that_had_output(
    cluster: ClusterProcess, single: ServerProcess, world: Path
) -> None:
    """And the one that comes in its place, which heard of nothing, serves the newest content."""
    async with connect(cluster) as client:
        (await client.put("/v1/adapters/moving", files=upload(world, 1))).raise_for_status()
        stop = asyncio.Event()
        asking = asyncio.create_task(keep_asking(client, 6, 200, stop))
        while not all(engine["running"] for engine in await engines_of(client)):
            await asyncio.sleep(0.1)
        before = {engine["replica"] for engine in await engines_of(client)}
        os.kill(min(cluster.replicas("Engine")), signal.SIGKILL)
        killed_at = time.monotonic()
        probes = await asyncio.gather(*(stream(client, chat(f"a{n}", 4)) for n in range(8)))
        served_s = max(probe.at for probe in probes) - killed_at
        newest = await client.put("/v1/adapters/moving", files=upload(world, 2))
        while len({e["replica"] for e in await engines_of(client)} & before) != 1:
            await asyncio.sleep(0.1)  # until the dead one is not counted any more
        while len(await engines_of(client)) < 2:
            await asyncio.sleep(0.1)
        back_s = time.monotonic() - killed_at
        stop.set()
        streams = await asking
        cut = [a for a in streams if a.error is not None]
        print(
            f"served after {served_s:.1f} s, two replicas after {back_s:.1f} s; "
            f"{len(cut)} streams cut of {len(streams)}"
        )
        await _all_serve(client, cluster.url, single.url, world, newest.json()["digest"])
    assert not wrong(probes, 4)
    assert served_s < BACK_S * N_BUSY
    assert not wrong([a for a in streams if a.error is None], 200)
    assert all(a.done and a.status == 200 for a in cut)  # an error event, and the end
    assert 0 < len(cut) <= 6


async def _all_serve(
    client: httpx.AsyncClient, ours: str, theirs: str, world: Path, digest: str
) -> None:
    """So many at once that every replica takes some; all are those of ``digest``."""
    put = httpx.put(f"{theirs}/v1/adapters/moving", files=upload(world, 2), headers=ADMIN)
    assert put.json()["digest"] == digest
    before = await taken_by(client, ["moving"])
    bodies = [body_of("moving", seed=n, temperature=1.0, logprobs=False, top_logprobs=None)
              for n in range(24)]  # fmt: skip
    found = await asyncio.to_thread(answers, ours, bodies, n_at_once=24)
    expected = await asyncio.to_thread(answers, theirs, bodies, n_at_once=24)
    assert [choices for choices, _, _ in found] == [choices for choices, _, _ in expected]
    assert {adapter["digest"] for _, _, adapter in found} == {digest}
    after = await taken_by(client, ["moving"])
    rose = [r for r, n in after["moving"].items() if n > before["moving"].get(r, 0)]
    assert len(rose) == 2, (before, after)


def upload(world: Path, number: int) -> dict[str, Any]:
    folder = world / "uploads" / str(number)
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {part: (name, (folder / name).read_bytes()) for part, name in names.items()}
