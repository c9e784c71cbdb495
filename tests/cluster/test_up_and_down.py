"""How clusters end: told from another terminal, without their Ray, without their application."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.cluster.ray.ray_head import ray_head
from loraplex_server.cluster.ray.running_clusters import RAY_SETTINGS
from tests.cluster.conftest import cluster_config
from tests.cluster.streams import chat, connect, engines_of, stream, wrong
from tests.support.servers.cluster_process import (
    ClusterProcess,
    cluster_process,
    free_port,
    joined_cluster,
    marked_environment,
    processes_of,
    serve_run,
)

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.anyio]

_LONG = 1500  # tokens of a stream that another terminal's command falls into


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def small(world: Path, folder: Path) -> dict[str, Any]:
    own = {"state-dir": str(folder / "state"), "kv-memory": "32MiB", "drain-timeout": 300}
    config = cluster_config(world, **own)
    config["gateways"]["replicas"] = config["engines"]["replicas"] = 1
    return config


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray, whose sockets have long names."""
    folder = Path(tempfile.mkdtemp(prefix="lx"))
    yield folder
    shutil.rmtree(folder)


async def test_another_terminal_takes_it_down_after_the_running_stream(
    world: Path, tmp_path: Path, short_folder: Path
) -> None:
    with cluster_process(small(world, tmp_path), tmp_path, {"TMPDIR": str(short_folder)}) as one:
        async with connect(one) as client:
            running = asyncio.create_task(stream(client, chat("a1", _LONG)))
            while not any(engine["running"] for engine in await engines_of(client)):
                await asyncio.sleep(0.1)
            await asyncio.to_thread(one.say, "down")
            assert not wrong([await running], _LONG)
        assert one.ended() == 0, one.log
        assert not processes_of(one.mark)
        assert not list(short_folder.iterdir())
        assert not list((tmp_path / "home/servers").iterdir())


def test_a_cluster_whose_ray_dies_says_so_and_leaves_nothing(
    world: Path, tmp_path: Path, short_folder: Path
) -> None:
    with cluster_process(small(world, tmp_path), tmp_path, {"TMPDIR": str(short_folder)}) as one:
        (gcs,) = (pid for pid, title in processes_of(one.mark).items() if "/gcs_server " in title)
        os.kill(gcs, signal.SIGKILL)
        assert one.ended() == 1, one.log
        assert "error: Ray's head" in one.log
        assert not [
            title for title in processes_of(one.mark).values() if "worker_processes" not in title
        ]
        assert not list(short_folder.glob("lx*"))
        assert not list((tmp_path / "home/servers").iterdir())


async def test_on_a_ray_that_runs_serve_run_and_up_serve_and_leave_it(
    world: Path, tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`up` notices when somebody else shuts Ray Serve down."""
    config = small(world, tmp_path)
    config["server"]["port"] = free_port()
    with marked_environment(tmp_path) as (mark, environment):
        for name, value in {**RAY_SETTINGS, **environment}.items():
            monkeypatch.setenv(name, value)
        with ray_head(short_folder, n_cpus=8, object_store_bytes=100 << 20, on_end=print) as ray:
            environment |= {**RAY_SETTINGS, "RAY_ADDRESS": ray}
            with serve_run(config, tmp_path, mark, environment) as one:
                await _serves(one)
            assert not one.replicas("Engine")
            config["ray"] = {"address": ray}
            with joined_cluster(config, tmp_path, mark, environment) as one:
                await _serves(one)
                one.shut_serve_down()
                assert one.ended() == 1, one.log
                # Which of the two is seen depends on how far the shutdown has come.
                seen = ("the application 'loraplex' was removed", "Ray Serve does not answer")
                assert any(f"error: {what}" in one.log for what in seen), one.log
            assert any("/raylet " in title for title in processes_of(mark).values())


async def _serves(cluster: ClusterProcess) -> None:
    async with connect(cluster) as client:
        assert not wrong([await stream(client, chat("a1", 8))], 8)
