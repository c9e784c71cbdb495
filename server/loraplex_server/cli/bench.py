"""`loraplex bench`: runs the load scenarios of the checkout and writes a report."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from .failed import failed


def bench(context: typer.Context) -> None:
    """Run a load scenario; write a report in Markdown, a plot and the numbers.

    Give the name of a scenario, the path of a TOML file, or `list`. Options are --url, --api-key,
    --model, --against, --vllm-venv, --llama-venv, --check-outputs, --out and --page:
    see docs/load-testing.md, and `python -m loadtests.run --help` in a checkout of the repository.
    """
    raise typer.Exit(_run(_checkout(), context.args))


def _run(root: Path, arguments: list[str]) -> int:
    """Run in another process, because locust patches sockets and threads of its process."""
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "loadtests.run", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child process gets it too and cleans up
            continue


def _checkout() -> Path:
    """Return the folder of the repository, which has the scenarios."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "loadtests" / "run.py").is_file():
        raise failed(
            "the load tests are not part of the installed package: run this from a checkout of "
            'the repository, installed with pip install --editable ".[load]"'
        )
    for package in ("locust", "matplotlib"):
        if find_spec(package) is None:
            raise failed(f'{package} is not installed: pip install "loraplex[load]"')
    return root
