"""What Ray is told of a cluster's processes."""

from pathlib import Path

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from loraplex_server.cluster.application import build_application
from loraplex_server.cluster.config import read_config


def test_ray_accepts_fixed_and_growing_fleets_with_and_without_limited_keys(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\nscope = "infer"\nrequests_per_minute = 5\n'
    )
    for engines in ("replicas: 2", "replicas: 2, min_replicas: 0, max_replicas: 4, gpus: 1"):
        for server in ("", f", keys: {keys}"):
            file = tmp_path / "cluster.yaml"
            file.write_text(f"server: {{state-dir: {tmp_path}{server}}}\nengines: {{{engines}}}\n")
            assert build_application(read_config(file)) is not None


def test_ray_neither_refuses_requests_nor_lets_them_wait(tmp_path: Path) -> None:
    """It knows no tenants. The engines' queues do, and each takes ``max-queue`` of each tenant."""
    file = tmp_path / "cluster.yaml"
    file.write_text(f"server: {{state-dir: {tmp_path}, max-queue: 2}}\n")
    config = read_config(file)
    gateways = build_application(config)._bound_deployment
    engines = gateways.init_args[1]._bound_deployment
    assert engines.name == "Engine"
    assert engines.max_queued_requests == -1
    n_at_gateways = config.gateways.replicas * gateways.max_ongoing_requests
    assert engines.max_ongoing_requests > 10 * n_at_gateways
