"""A cluster that this process starts, serves with, and takes down again."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from loraplex_server.settings import HttpConfig

from .application import build_application
from .config import ClusterConfig
from .ray_head import ray_head

__all__ = ["deploy", "running_cluster", "status_lines"]

_NAMESPACE = "serve"


@contextlib.contextmanager
def running_cluster(config: ClusterConfig, folder: Path | None) -> Iterator[str]:
    """Inside the block the application serves; the value is Ray's address.

    With ``ray.address`` the application joins that cluster and is removed afterwards; without, Ray
    runs on this machine inside the block, with its files in ``folder``. Raises OSError or
    RuntimeError if it cannot be started.
    """
    with contextlib.ExitStack() as closing:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            address = _connect(config, folder, closing)
            http = _http_options(config.server.http)
            serve.start(proxy_location=_proxies(config), http_options=http)
        except (RayError, RayServeException) as error:
            raise RuntimeError(f"Ray does not start: {error}") from error
        closing.callback(_remove, config)
        deploy(config)
        yield address


def deploy(config: ClusterConfig) -> None:
    """Starts the application, or brings the one of that name to ``config``: a rolling upgrade.

    Raises RuntimeError; what served before serves on.
    """
    try:
        serve.run(build_application(config), name=config.name, route_prefix="/")
    except (RayError, RayServeException) as error:
        raise RuntimeError(f"the application does not start: {error}") from error


def status_lines(address: str) -> list[str]:
    """A line for each deployment of the Ray cluster at ``address``. Raises ConnectionError."""
    ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level="error")
    try:
        lines = []
        for name, application in serve.status().applications.items():
            lines.append(f"{name}: {application.status.value}")
            for deployment, found in application.deployments.items():
                states = ", ".join(
                    f"{count} {state}" for state, count in found.replica_states.items() if count
                )
                lines.append(f"  {deployment}: {found.status.value}, {states or 'no replica'}")
        return lines
    finally:
        ray.shutdown()


def _connect(config: ClusterConfig, folder: Path | None, closing: contextlib.ExitStack) -> str:
    address = config.ray.address
    if folder is not None:
        address = closing.enter_context(
            ray_head(
                folder,
                n_cpus=_cpus(config),
                object_store_bytes=config.ray.object_store_bytes,
            )
        )
    context = ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False)
    closing.callback(ray.shutdown)
    return str(context.address_info["address"])


def _cpus(config: ClusterConfig) -> int:
    """Of Ray's count, on a machine of its own: every process twice, as in an upgrade."""
    engines, gateways = config.engines, config.gateways
    n_engines = max(engines.replicas, engines.max_replicas or 0)
    needed = 1 + 2 * (n_engines * engines.cpus + (gateways.replicas + 1) * gateways.cpus)
    return max(os.cpu_count() or 1, math.ceil(needed))


def _remove(config: ClusterConfig) -> None:
    """What others run on the same Ray stays."""
    if config.ray.address is None:
        serve.shutdown()
    else:
        serve.delete(config.name)


def _proxies(config: ClusterConfig) -> str:
    """On one machine one proxy; on a cluster that runs one on each node with a gateway."""
    return "HeadOnly" if config.ray.address is None else "EveryNode"


def _http_options(http: HttpConfig) -> dict[str, object]:
    return {"host": http.host, "port": http.port, "keep_alive_timeout_s": 75}
