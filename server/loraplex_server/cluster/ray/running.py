"""Starting and stopping Ray, Ray Serve and the application of a cluster."""

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

from loraplex_server.cluster.application import build_application
from loraplex_server.cluster.config import ClusterConfig

from .ray_head import ray_head

_NAMESPACE = "serve"
_POLL_S = 0.5  # between two checks whether the application is gone
_EXIT_S = 30.0  # for processes to end, after their last request


@contextlib.contextmanager
def running_ray(
    config: ClusterConfig, folder: Path | None, on_loss: Callable[[str], None]
) -> Iterator[str]:
    """Yield the address of a running Ray.

    With ``folder``, Ray is started on this machine, with its files there, and ends with the block;
    ``on_loss`` is called in another thread if Ray ends earlier. Without, it is the Ray of
    ``ray.address``. Raises RuntimeError if Ray does not start.
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
    """Connect to Ray and return its full address. Any thread. Raises RuntimeError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        context = ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False)
    except (RayError, ConnectionError) as error:
        raise RuntimeError(f"Ray cannot be reached: {error}") from error
    return str(context.address_info["address"])


def start(config: ClusterConfig) -> None:
    """Start Ray Serve, unless it runs, and the application. Any thread. Raises RuntimeError."""
    http = config.server.http
    options = {"host": http.host, "port": http.port, "keep_alive_timeout_s": 75}
    # A Ray of our own has one proxy here. A joined Ray has one on each node with a gateway.
    proxies = "HeadOnly" if config.ray.address is None else "EveryNode"
    try:
        serve.start(proxy_location=proxies, http_options=options)
    except (RayError, RayServeException) as error:
        raise RuntimeError(f"Ray Serve does not start: {error}") from error
    deploy(config)


def deploy(config: ClusterConfig) -> None:
    """Start the application, or upgrade the running one to ``config``. Any thread.

    Raises RuntimeError; a running application then continues.
    """
    try:
        serve.run(build_application(config), name=config.name, route_prefix="/")
    except (RayError, RayServeException) as error:
        raise RuntimeError(f"the application does not start: {error}") from error


def remove(config: ClusterConfig) -> None:
    """Remove the application after the drain timeout, and disconnect from Ray.

    Other applications on the same Ray stay. Does nothing before ``connect``.
    """
    if not ray.is_initialized():
        return
    # ``serve.shutdown`` waits 30 s, ``serve.delete`` 60 s, whatever the drain timeout.
    deadline = time.monotonic() + config.server.http.drain_timeout_s + _EXIT_S
    with contextlib.suppress(RayError, RayServeException):  # it is gone already
        serve.delete(config.name, _blocking=False)
        while config.name in serve.status().applications and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if config.ray.address is None:
            serve.shutdown()
    ray.shutdown()


def status_lines(address: str) -> list[str]:
    """Return a line for each deployment at ``address``. Raises ConnectionError."""
    ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level="error")
    try:
        lines = []
        for name, application in serve.status().applications.items():
            lines.append(f"{name}: {application.status.value}")
            for deployment, overview in application.deployments.items():
                states = ", ".join(
                    f"{count} {state}" for state, count in overview.replica_states.items() if count
                )
                lines.append(f"  {deployment}: {overview.status.value}, {states or 'no replica'}")
        return lines
    finally:
        ray.shutdown()


def _cpus(config: ClusterConfig) -> int:
    """Return the CPUs that Ray gets on this machine: two for each process, for upgrades."""
    engines, gateways = config.engines, config.gateways
    n_engines = max(engines.replicas, engines.max_replicas or 0)
    needed = 1 + 2 * (n_engines * engines.cpus + (gateways.replicas + 1) * gateways.cpus)
    return max(os.cpu_count() or 1, math.ceil(needed))
