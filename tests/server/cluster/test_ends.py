"""How a cluster's process learns that another one has ended, without Ray running."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from loraplex_server.cluster.config import read_config
from loraplex_server.cluster.ray.running_clusters import announced_cluster, running_clusters
from loraplex_server.cluster.ray.serving import watched_ray


def test_a_ray_at_whose_address_nobody_listens_any_more_is_lost() -> None:
    lost: SimpleQueue[str] = SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with watched_ray(address, lost.put, patience_s=0.0):
            listening.accept()[0].close()  # it has looked
            assert lost.empty()
            listening.close()
            assert address in lost.get(timeout=60)


def test_a_home_that_cannot_be_written_ends_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster is announced anew after each upgrade."""
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path))
    config = read_config(None)
    with announced_cluster(tmp_path, config, "127.0.0.1:6379", None) as url:
        assert running_clusters(tmp_path)
        (tmp_path / "servers").rename(tmp_path / "servers-before")
        (tmp_path / "servers").touch()  # no folder any more
    with announced_cluster(tmp_path, config, "127.0.0.1:6379", None) as again:
        assert again == url
    assert "loraplex cluster down" in caplog.text


def test_a_cluster_is_found_until_its_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended, and not yet asked for by its parent: `down` waits for it no longer."""
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path))
    with announced_cluster(tmp_path, read_config(None), "127.0.0.1:6379", None):
        (ours,) = running_clusters(tmp_path)
        assert ours.server.lives
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            file = tmp_path / "servers" / f"{child.pid}.json"
            file.write_text(json.dumps({"url": ours.server.url, "cluster": ours.server.cluster}))
            (theirs,) = (c for c in running_clusters(tmp_path) if c.server.pid == child.pid)
            assert child.stdin is not None
            child.stdin.close()
            while theirs.server.lives:
                assert child.returncode is None  # nobody waits for it here
            assert running_clusters(tmp_path) == [ours]
            assert not file.exists()
    assert running_clusters(tmp_path) == []
