"""One cluster of two gateways and two engine replicas for all modules, and one process."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.attacks.downloads import MAX_BYTES, HostileWeb, hostile_web
from tests.attacks.two_tenants import keys_of
from tests.contract.conftest import ADAPTERS, INFER
from tests.contract.conftest import ADMIN as ADMIN_KEY
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.cluster_process import ClusterProcess, cluster_process
from tests.support.servers.server_process import ServerProcess, save_tiny_model, server_process

N_ADAPTERS, N_UNUSED, N_UPLOADS = 24, 24, 8
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
LIMITED, GREEDY, MODEST = (
    {"Authorization": f"Bearer {name}-secret"} for name in ("limited", "greedy", "modest")
)


def _key(name: str, *limits: str) -> str:
    secret = hashlib.sha256(f"{name}-secret".encode()).hexdigest()
    lines = ("[[key]]", f'name = "{name}"', f'sha256 = "{secret}"', 'scope = "infer"', *limits)
    return "\n".join(lines) + "\n"


_KEYS = _key("limited", "requests_per_minute = 10") + _key("greedy") + _key("modest")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in ``tiny``; in ``adapters`` a0, a1 … of it, and those of ``tests/contract``.

    One test alone asks for s0, s1 …; those in ``uploads`` are not registered.
    """
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny_model(folder / "tiny")
    spec = BaseSpec.of(tiny_model(eos_token_id=2, max_position_embeddings=4096), "tiny")
    for number in range(N_ADAPTERS):
        write_lora(
            folder / "adapters" / f"a{number}",
            spec,
            rank=2 + number % 7,
            seed=400 + number,
            scale=0.4,
        )
    for number, name in enumerate(ADAPTERS):
        write_lora(folder / "adapters" / name, spec, rank=2 + number, seed=number, scale=0.4)
    for number in range(N_UNUSED):
        write_lora(folder / "adapters" / f"s{number}", spec, seed=300 + number, scale=0.4)
    for number in range(N_UPLOADS):
        write_lora(folder / "uploads" / str(number), spec, seed=200 + number, scale=0.4)
    (folder / "keys.toml").write_text(_KEYS)
    return folder


def cluster_config(world: Path, **server: Any) -> dict[str, Any]:
    options = {
        "model": str(world / "tiny"),
        "state-dir": str(world / "state"),
        "adapters-dir": [str(world / "adapters")],
        "api-key": ADMIN_KEY,
        "infer-api-key": INFER,
        "catalogue-refresh": 0,  # every gateway sees a change at once
        "keys": str(world / "keys.toml"),
        "dtype": "float32",
        "threads": 1,
        "kv-memory": "8MiB",
        "adapter-memory": "8MiB",
        "max-batch-size": 8,
        "max-queue": 64,
        "demos": False,
        **server,
    }
    return {
        "server": options,
        "gateways": {"replicas": 2, "cpus": 0.2},
        "engines": {"replicas": 2, "cpus": 0.2},
    }


@pytest.fixture(scope="session")
def web(world: Path) -> Iterator[HostileWeb]:
    """What the tenants ``flood`` and ``small`` may download from; ``lora`` is an adapter."""
    shutil.copytree(world / "uploads" / "0", world / "web" / "lora")
    with hostile_web(world / "web") as web:
        with (world / "keys.toml").open("a") as keys:
            keys.write(keys_of("flood", "small", web_url=web.url))
        yield web


@pytest.fixture(scope="session")
def cluster(world: Path, web: HostileWeb) -> Iterator[ClusterProcess]:
    downloads = {"allow-source": [web.url], "max-upload-size": MAX_BYTES}
    with cluster_process(cluster_config(world, **downloads), world) as running:
        yield running


@pytest.fixture(scope="session")
def single(world: Path) -> Iterator[ServerProcess]:
    flags = ("--adapters-dir", world / "adapters", "--api-key", ADMIN_KEY)
    with server_process(world / "tiny", world / "single", *flags) as running:
        yield running
