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

if TYPE_CHECKING:
    from loraplex_server.cluster.config import ClusterConfig
    from loraplex_server.cluster.running_clusters import RunningCluster

__all__ = ["cluster"]

_MORE_S = 120.0  # for a cluster to go down, after its running requests

cluster = typer.Typer(
    help="Several engines behind one address, on Ray Serve.", no_args_is_help=True
)

_ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="cluster.yaml; without one: two of each, defaults.", dir_okay=False),
]


@cluster.command()
def up(config: _ConfigFile = None) -> None:
    """Start a cluster and serve until Ctrl-C. SIGHUP reads the file again: a rolling upgrade."""
    _check_ray()
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `loraplex serve` does
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread must not start Ray again
    resolved = _read(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also while it starts

    from loraplex_server.cluster.errors import ClusterLost
    from loraplex_server.cluster.ray_folder import own_ray_folder

    try:
        if resolved.ray.address is not None:
            _serve(resolved, config, None)
        else:
            with own_ray_folder() as folder:
                _serve(resolved, config, folder)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ClusterLost as error:
        _failed(error)
        sys.stdout.flush()
        os._exit(1)  # at Python's end Ray's threads would wait for what has gone, or crash
    except (OSError, ValueError, RuntimeError) as error:
        raise _failed(error) from None


@cluster.command()
def status() -> None:
    """What runs: deployments and their replicas."""
    _check_ray()
    from loraplex_server.cluster.ray_folder import use_token

    found = _running()
    if found.token is not None:
        use_token(Path(found.token))  # before Ray is imported
    from loraplex_server.cluster.running import status_lines

    typer.echo(f"{found.name} at {found.url}, Ray at {found.address}")
    for line in status_lines(found.address):
        typer.echo(line)


@cluster.command()
def down() -> None:
    """End the cluster that runs on this machine, as Ctrl-C does: running requests finish."""
    found = _running()
    os.kill(found.pid, signal.SIGTERM)
    limit_s = found.drain_timeout_s + _MORE_S
    deadline = time.monotonic() + limit_s
    while found.lives:
        if time.monotonic() > deadline:
            raise _failed(f"process {found.pid} has not ended within {limit_s:.0f} s")
        time.sleep(0.1)


def _serve(config: ClusterConfig, file: Path | None, folder: Path | None) -> None:
    from loraplex_server.cluster.config import read_config
    from loraplex_server.cluster.running_clusters import announced_cluster
    from loraplex_server.cluster.serving import serve_until_told
    from loraplex_server.model.pull import loraplex_home

    token = None if folder is None else folder / "token"

    @contextlib.contextmanager
    def serving(config: ClusterConfig, address: str) -> Iterator[None]:
        with announced_cluster(loraplex_home(), config, address, token) as url:
            model = config.server.model or "the default base"
            typer.echo(f"loraplex cluster serves {model} at {url}  (Ctrl-C ends it)")
            yield

    def say(text: str) -> None:
        typer.echo(text, err=True)

    serve_until_told(config, folder, read=lambda: read_config(file), serving=serving, say=say)


def _read(path: Path | None) -> ClusterConfig:
    from loraplex_server.cluster.config import read_config
    from loraplex_server.settings import ConfigError

    try:
        return read_config(path)
    except ConfigError as error:
        raise _failed(error) from None


def _running() -> RunningCluster:
    from loraplex_server.cluster.running_clusters import running_clusters
    from loraplex_server.model.pull import loraplex_home

    found = running_clusters(loraplex_home())
    if not found:
        raise _failed("no cluster of `loraplex cluster up` runs on this machine")
    return found[-1]


def _check_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise _failed('Ray is not installed: pip install "loraplex[ray]"')


def _failed(error: Exception | str) -> typer.Exit:
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(1)
