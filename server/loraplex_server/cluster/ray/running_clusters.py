"""The running clusters of this machine, and the folder, token and settings of a Ray of our own.

Import this before Ray, which reads its settings on import.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraplex_server.listening import reachable_url
from loraplex_server.running_servers import RunningServer, announced, running_servers

if TYPE_CHECKING:
    from loraplex_server.cluster.config import ClusterConfig

# A silent process on the same machine is rarely dead: other work holds the processors.
RAY_SETTINGS = {
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    # Ray's default is 15, and training beside an engine has 10.
    "RAY_worker_niceness": "0",
}


class ClusterLost(RuntimeError):
    """Ray or the application is gone. Make no further call to Ray."""


@contextlib.contextmanager
def own_ray_folder() -> Iterator[Path]:
    """Yield a temporary folder for Ray's sockets, logs and ``token``.

    Whoever can talk to Ray can run code here, so Ray asks callers for the token.
    """
    folder = Path(tempfile.mkdtemp(prefix="lx"))  # short, since sockets below have long names
    try:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        use_token(token)
        for name, value in RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def use_token(file: Path) -> None:
    """Use the token in this process and its children."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


class RunningCluster(NamedTuple):
    server: RunningServer  # `loraplex cluster up`
    address: str  # Ray's
    token: str | None  # file with Ray's token
    name: str  # Ray's application
    drain_timeout_s: float  # for running requests when the cluster goes down


@contextlib.contextmanager
def announced_cluster(
    home: Path, config: ClusterConfig, address: str, token: Path | None
) -> Iterator[str]:
    """Announce the cluster inside the block, and yield its URL."""
    http = config.server.http
    url = reachable_url(http.host, http.port)
    fields = {
        "address": address,
        "token": None if token is None else str(token),
        "name": config.name,
        "drain_timeout_s": http.drain_timeout_s,
    }
    with announced(home, url, fields):
        yield url


def running_clusters(home: Path) -> list[RunningCluster]:
    """Return the running clusters, oldest first."""
    servers = running_servers(home)
    return [RunningCluster(server, **server.cluster) for server in servers if server.cluster]
