"""The commands of the pages about clusters, on the cluster of `deploy/cluster.yaml`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.not_run import ON_A_CLUSTER
from tests.docs.page_examples import examples_of
from tests.support.servers.cluster_process import ClusterProcess, cluster_process
from tests.support.servers.server_process import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
_SMALL = {"dtype": "float32", "threads": 1, "kv-memory": "8MiB", "adapter-memory": "8MiB"}
_COMMAND_S = 240  # other work may hold the machine


def test_the_commands_of_the_pages_do_what_they_say(tmp_path: Path) -> None:
    lines = [
        re.sub(r"\s+#.*", "", line)
        for name, beginnings in ON_A_CLUSTER.items()
        for example in examples_of(ROOT / name)
        if example.code.startswith(beginnings)
        for line in example.code.splitlines()
    ]
    up, down = "loraplex cluster up deploy/cluster.yaml", "loraplex cluster down"
    asked = set(lines) - {'pip install "loraplex[ray]"', up, down}
    assert asked == {
        "loraplex cluster status",
        "curl -s http://127.0.0.1:8000/v1/cluster | python -m json.tool",
    }
    assert {up, down} < set(lines)
    config = yaml.safe_load((ROOT / up.split()[-1]).read_text())
    config["server"] |= {**_SMALL, "model": str(save_tiny_model(tmp_path / "tiny"))}
    with cluster_process(config, tmp_path) as cluster:
        status = _said(cluster, "loraplex cluster status")
        assert status.startswith(f"loraplex at {cluster.url}, Ray at ")
        (curl,) = (line for line in asked if line.startswith("curl"))
        told = json.loads(_said(cluster, curl))["cluster"]
        assert len(told["engines"]) == config["engines"]["replicas"]
        _said(cluster, down)
        assert cluster.process.wait(_COMMAND_S) == 0, cluster.log


def _said(cluster: ClusterProcess, command: str) -> str:
    """Run a command as from another terminal, with the `loraplex` of these tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("http://127.0.0.1:8000", cluster.url)],
        env={**cluster.environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
