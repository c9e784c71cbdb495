"""A fleet that grows and shrinks with its load, down to no replica at all."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import cluster_config
from tests.cluster.streams import chat, connect, engines_of, keep_asking, stream, wrong
from tests.support.servers.cluster_process import ClusterProcess, cluster_process

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.anyio]

_QUICK = {  # Ray's reports of load, every second instead of ten
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
_PER_REPLICA = 6


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def growing(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    config = cluster_config(world, **{"state-dir": str(world / "growing"), "kv-memory": "32MiB"})
    config["engines"] |= {
        "replicas": 1,
        "min_replicas": 0,
        "max_replicas": 2,
        "requests_per_replica": _PER_REPLICA,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "look_back_s": 2,
    }
    folder = tmp_path_factory.mktemp("growing")
    with cluster_process(config, folder, _QUICK) as cluster:
        yield cluster


async def until_replicas(cluster: ClusterProcess, count: int) -> None:
    while len(cluster.replicas("Engine")) != count:
        await asyncio.sleep(0.2)


async def test_the_last_replica_goes_and_the_next_request_brings_one(
    growing: ClusterProcess,
) -> None:
    await until_replicas(growing, 0)
    async with connect(growing) as client:
        assert (await client.get("/health")).status_code == 200
        answers = await asyncio.gather(*(stream(client, chat("a1", 8)) for _ in range(3)))
    assert not wrong(answers, 8)
    assert len(growing.replicas("Engine")) >= 1


async def test_a_replica_is_added_for_load_and_finishes_its_streams_before_it_goes(
    growing: ClusterProcess,
) -> None:
    async with connect(growing) as client:
        stop = asyncio.Event()
        loading = asyncio.create_task(keep_asking(client, 3 * _PER_REPLICA, 100, stop))
        while len(await engines_of(client)) < 2:
            await asyncio.sleep(0.2)
        stop.set()
        assert not wrong(await loading, 100)
        # One replica is enough for so many, and the bound on its load gives some to the other one.
        long = [asyncio.create_task(stream(client, chat(f"a{n}", 4000))) for n in range(5)]
        while not all(engine["running"] for engine in await engines_of(client)):
            await asyncio.sleep(0.1)
        is_draining = False
        while not is_draining and not any(task.done() for task in long):
            await asyncio.sleep(0.1)
            n_taking = len(await engines_of(client))  # that gateways know of
            is_draining = n_taking == 1 and len(growing.replicas("Engine")) == 2
        answers = await asyncio.gather(*long)
    assert is_draining
    assert not wrong(answers, 4000)
    await until_replicas(growing, 0)
