"""One cluster of two gateways and two engine replicas for all modules, and one process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.architectures import tiny_model
from tests.support.cluster_process import ClusterProcess, cluster_process
from tests.support.lora_files import write_lora
from tests.support.server_process import ServerProcess, save_tiny_model, server_process

N_ADAPTERS = 24
ADMIN = {"Authorization": "Bearer admin-secret"}
LIMITED = {"Authorization": "Bearer limited-secret"}  # ten requests a minute
_KEYS = f"""
[[key]]
name = "limited"
sha256 = "{hashlib.sha256(b"limited-secret").hexdigest()}"
scope = "infer"
requests_per_minute = 10
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base in ``model``, and adapters a0, a1 … of it in ``adapters``."""
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny_model(folder / "model")
    spec = BaseSpec.of(tiny_model(eos_token_id=2, max_position_embeddings=4096), "tiny")
    for number in range(N_ADAPTERS):
        write_lora(
            folder / "adapters" / f"a{number}", spec, rank=2 + number % 7, seed=number, scale=0.4
        )
    (folder / "keys.toml").write_text(_KEYS)
    return folder


def cluster_config(world: Path, **server: Any) -> dict[str, Any]:
    options = {
        "model": str(world / "model"),
        "state-dir": str(world / "state"),
        "adapters-dir": [str(world / "adapters")],
        "api-key": "admin-secret",
        "keys": str(world / "keys.toml"),
        "dtype": "float32",
        "threads": 1,
        "kv-memory": "8MiB",
        "adapter-memory": "8MiB",
        "demos": False,
        **server,
    }
    return {
        "server": options,
        "gateways": {"replicas": 2, "cpus": 0.2},
        "engines": {"replicas": 2, "cpus": 0.2},
    }


@pytest.fixture(scope="session")
def cluster(world: Path) -> Iterator[ClusterProcess]:
    with cluster_process(cluster_config(world), world) as running:
        yield running


@pytest.fixture(scope="session")
def single(world: Path) -> Iterator[ServerProcess]:
    flags = ("--adapters-dir", world / "adapters", "--api-key", "admin-secret")
    with server_process(world / "model", world / "single", *flags) as running:
        yield running
