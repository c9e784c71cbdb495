"""A cluster that this process starts, serves with, and takes down again."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from loraplex_server.settings import HttpConfig

from .application import build_application
from .config import ClusterConfig
from .ray_head import ray_head

__all__ = ["connect", "deploy", "remove", "running_ray", "start", "status_lines"]

_NAMESPACE = "serve"
_LOOK_S = 0.5  # between two looks whether the application has gone
_MORE_S = 30.0  # for processes to go, after their last request


@contextlib.contextmanager
def running_ray(
    config: ClusterConfig, folder: Path | None, on_loss: Callable[[str], None]
) -> Iterator[str]:
    """Inside the block Ray runs; the value is its address.

    With ``folder`` it runs on this machine inside the block, with its files there, and ``on_loss``
    is told, in another thread, if it ends before. Without, it is that of ``ray.address``. Raises
    RuntimeError if it does not start.
    """
    if folder is None:
        assert config.ray.address is not None
        yield config.ray.address
        return
    n_bytes = config.ray.object_store_bytes
    with ray_head(
        folder, n_cpus=_cpus(config), object_store_bytes=n_bytes, on_end=on_loss
    ) as address:
        yield address


def connect(address: str) -> str:
    """To Ray; returns its address in full. Any thread, since it may wait. Raises RuntimeError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        context = ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False)
    except (RayError, ConnectionError) as error:
        raise RuntimeError(f"Ray cannot be reached: {error}") from error
    return str(context.address_info["address"])


def start(config: ClusterConfig) -> None:
    """Starts Ray Serve, where it does not run, and the application.

    Any thread. Raises RuntimeError.
    """
    http = _http_options(config.server.http)
    try:
        serve.start(proxy_location=_proxies(config), http_options=http)
    except (RayError, RayServeException) as error:
        raise RuntimeError(f"Ray Serve does not start: {error}") from error
    deploy(config)


def deploy(config: ClusterConfig) -> None:
    """Starts the application, or brings the one of that name to ``config``: a rolling upgrade.

    Any thread. Raises RuntimeError; what served before serves on.
    """
    try:
        serve.run(build_application(config), name=config.name, route_prefix="/")
    except (RayError, RayServeException) as error:
        raise RuntimeError(f"the application does not start: {error}") from error


def remove(config: ClusterConfig) -> None:
    """Takes the application down when running requests have had their time, and leaves Ray.

    What others run on the same Ray stays. Nothing happens before ``connect``.
    """
    if not ray.is_initialized():
        return
    # ``serve.shutdown`` waits for 30 s, ``serve.delete`` for 60, whatever requests may take.
    deadline = time.monotonic() + config.server.http.drain_timeout_s + _MORE_S
    with contextlib.suppress(RayError, RayServeException):  # it has gone already
        serve.delete(config.name, _blocking=False)
        while config.name in serve.status().applications and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        if config.ray.address is None:
            serve.shutdown()
    ray.shutdown()


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


def _cpus(config: ClusterConfig) -> int:
    """Of Ray's count, on a machine of its own: every process twice, as in an upgrade."""
    engines, gateways = config.engines, config.gateways
    n_engines = max(engines.replicas, engines.max_replicas or 0)
    needed = 1 + 2 * (n_engines * engines.cpus + (gateways.replicas + 1) * gateways.cpus)
    return max(os.cpu_count() or 1, math.ceil(needed))


def _proxies(config: ClusterConfig) -> str:
    """On one machine one proxy; on a cluster that runs one on each node with a gateway."""
    return "HeadOnly" if config.ray.address is None else "EveryNode"


def _http_options(http: HttpConfig) -> dict[str, object]:
    return {"host": http.host, "port": http.port, "keep_alive_timeout_s": 75}
