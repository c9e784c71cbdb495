"""`loraplex cluster`: gateways and engine replicas on Ray Serve."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failed import failed
from .serve import set_thread_defaults

if TYPE_CHECKING:
    from loraplex_server.cluster.config import ClusterConfig
    from loraplex_server.cluster.ray.running_clusters import RunningCluster

_MORE_S = 120.0  # for a cluster to end after its running requests

cluster = typer.Typer(
    help="Several engines behind one address, on Ray Serve.", no_args_is_help=True
)

_ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="Cluster file in YAML. Default: two engines.", dir_okay=False),
]


@cluster.command()
def up(config: _ConfigFile = None) -> None:
    """Start a cluster and serve until Ctrl-C. SIGHUP reads the file again and upgrades in turns."""
    _check_ray()
    set_thread_defaults()
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread must not start Ray again
    resolved = _read(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also during the start

    from loraplex_server.cluster.ray.running_clusters import ClusterLost, own_ray_folder

    try:
        if resolved.ray.address is not None:
            _serve(resolved, config, None)
        else:
            with own_ray_folder() as folder:
                _serve(resolved, config, folder)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ClusterLost as error:
        failed(error)
        sys.stdout.flush()
        os._exit(1)  # Ray's threads would wait for lost processes, or crash
    except (OSError, ValueError, RuntimeError) as error:
        raise failed(error) from None


@cluster.command()
def status() -> None:
    """Show the deployments and their replicas."""
    _check_ray()
    from loraplex_server.cluster.ray.running_clusters import use_token

    running = _running()
    if running.token is not None:
        use_token(Path(running.token))  # before Ray is imported
    from loraplex_server.cluster.ray.running import status_lines

    typer.echo(f"{running.name} at {running.server.url}, Ray at {running.address}")
    for line in status_lines(running.address):
        typer.echo(line)


@cluster.command()
def down() -> None:
    """End the cluster on this machine once its running requests have finished, like Ctrl-C."""
    running = _running()
    os.kill(running.server.pid, signal.SIGTERM)
    limit_s = running.drain_timeout_s + _MORE_S
    deadline = time.monotonic() + limit_s
    while running.server.lives:
        if time.monotonic() > deadline:
            raise failed(f"process {running.server.pid} has not ended within {limit_s:.0f} s")
        time.sleep(0.1)


def _serve(config: ClusterConfig, file: Path | None, folder: Path | None) -> None:
    from loraplex_server.cluster.config import read_config
    from loraplex_server.cluster.ray.running_clusters import announced_cluster
    from loraplex_server.cluster.ray.serving import serve_until_stopped
    from loraplex_server.model.loading.pull import loraplex_home

    token = None if folder is None else folder / "token"

    @contextlib.contextmanager
    def serving(config: ClusterConfig, address: str) -> Iterator[None]:
        with announced_cluster(loraplex_home(), config, address, token) as url:
            model = config.server.model or "the default base"
            typer.echo(f"loraplex cluster serves {model} at {url}  (Ctrl-C ends it)")
            yield

    def say(text: str) -> None:
        typer.echo(text, err=True)

    serve_until_stopped(config, folder, read=lambda: read_config(file), serving=serving, say=say)


def _read(path: Path | None) -> ClusterConfig:
    from loraplex_server.cluster.config import read_config
    from loraplex_server.settings.config import ConfigError

    try:
        return read_config(path)
    except ConfigError as error:
        raise failed(error) from None


def _running() -> RunningCluster:
    from loraplex_server.cluster.ray.running_clusters import running_clusters
    from loraplex_server.model.loading.pull import loraplex_home

    clusters = running_clusters(loraplex_home())
    if not clusters:
        raise failed("no cluster of `loraplex cluster up` runs on this machine")
    return clusters[-1]


def _check_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise failed('Ray is not installed: pip install "loraplex[ray]"')
