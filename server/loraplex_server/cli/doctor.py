"""`loraplex doctor` and `loraplex --version`."""

import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import typer

_PACKAGES = ("torch", "transformers", "peft", "llguidance", "fastapi", "uvicorn")
_EXTRAS = {"ray": "ray", "catalogue": "obstore", "load": "locust", "flashinfer": "flashinfer"}
_LEAST_FREE = 4 << 30  # bytes of disk


def say_version(wanted: bool) -> None:
    """Print the version and exit, if ``--version`` is given."""
    if wanted:
        typer.echo(f"loraplex {_version('loraplex')}")
        raise typer.Exit


def doctor() -> None:
    """Show what is installed, where the server computes and stores, and what makes it slow.

    Exits with status 1 if a problem would stop or slow the server.
    """
    problems: list[str] = []
    for name, text in (
        *_installed(),
        *_computes(problems),
        *_stores(problems),
        *_listens(problems),
    ):
        typer.echo(f"{name:22} {text}")
    for problem in problems:
        typer.secho(f"{'problem':22} {problem}", fg="yellow")
    if problems:
        raise typer.Exit(1)
    typer.echo("no problems")


def _installed() -> Iterator[tuple[str, str]]:
    yield "loraplex", f"{_version('loraplex')} on Python {platform.python_version()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    present = [extra for extra, name in _EXTRAS.items() if importlib.util.find_spec(name)]
    yield "extras", f"{', '.join(present) or 'none'} of {', '.join(_EXTRAS)}"


def _computes(problems: list[str]) -> Iterator[tuple[str, str]]:
    import torch

    from loraplex_kernels.cpu import native

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield "device", f"cuda: {', '.join(names)}"
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            yield f"memory cuda:{index}", f"{_size(free)} free of {_size(total)}"
    else:
        yield "device", f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores"
        if shutil.which("nvidia-smi"):
            problems.append(
                "nvidia-smi is here, but this torch sees no GPU: install its CUDA build"
            )
    yield "CPU kernels", "native" if native.available() else "PyTorch references"
    if not native.available():
        problems.append(
            "the native CPU kernels do not run, so a CPU is several times slower: install a C++ "
            "compiler and install loraplex again"
        )


def _stores(problems: list[str]) -> Iterator[tuple[str, str]]:
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.loading.pull import (
        DEFAULT_BASE,
        DEFAULT_ENCODER,
        loraplex_home,
        resolve_model,
    )

    home = loraplex_home()
    above = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(above).free
    yield "LORAPLEX_HOME", f"{home}, {_size(free)} free"
    if not os.access(above, os.W_OK):
        problems.append(f"{above} cannot be written: set LORAPLEX_HOME to a folder of yours")
    if free < _LEAST_FREE:
        problems.append(f"{above} has only {_size(free)} left for models and adapters")
    for spec in (DEFAULT_BASE, DEFAULT_ENCODER):
        try:
            yield spec, str(resolve_model(spec))
        except ModelError as error:
            yield spec, str(error)


def _listens(problems: list[str]) -> Iterator[tuple[str, str]]:
    from loraplex_server.model.loading.pull import loraplex_home
    from loraplex_server.running_servers import running_servers
    from loraplex_server.settings.config import HttpConfig

    urls = [server.url for server in running_servers(loraplex_home())]
    yield "running servers", ", ".join(urls) or "none"
    port = int(os.environ.get("LORAPLEX_PORT") or HttpConfig().port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            yield f"port {port}", "free"
        except OSError as error:
            yield f"port {port}", str(error.strerror)
            if not any(url.endswith(f":{port}") for url in urls):
                problems.append(f"another program uses port {port}: choose another --port")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.1f} GiB"
