"""The server under test: started for the run, or one that is already there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .streaming import Connections

__all__ = ["Target", "base_name", "running_target", "started_target"]

_START_S = 600.0
_URL = re.compile(r"serves .* at (http://\S+)")


@dataclass(frozen=True, slots=True)
class Target:
    url: str
    pid: int | None  # None: not ours, so its memory is not seen
    model: str  # name of the base in requests


def running_target(url: str, api_key: str | None) -> Target:
    return Target(url.rstrip("/"), None, base_name(Connections(url, api_key)))


def base_name(connections: Connections) -> str:
    """The first model listed is the base. Raises RuntimeError."""
    status, text = connections.send("GET", "/v1/models")
    if status != 200:
        raise RuntimeError(f"GET /v1/models answered {status}")
    return str(json.loads(text)["data"][0]["id"])


@contextmanager
def started_target(
    model: Path, adapters: Path, state: Path, options: Mapping[str, object], log: Path
) -> Iterator[Target]:
    """A `loraplex serve` on a free port; ready when entered, stopped when left.

    ``options`` are those of the scenario; they win over what is set here. Raises RuntimeError
    with the end of the log if the server does not come up.
    """
    settings: dict[str, object] = {
        "port": 0,
        "model": model,
        "served-model-name": "base",
        "adapters-dir": adapters,
        "state-dir": state,
        "log-level": "warning",
        **{key.replace("_", "-"): value for key, value in options.items()},
    }
    command = [sys.executable, "-m", "loraplex_server.cli.app", "serve", "--no-demos"]
    for key, value in settings.items():
        if isinstance(value, bool):
            command.append(f"--{key}" if value else f"--no-{key}")
        else:
            command += [f"--{key}", str(value)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORAPLEX_")}
    kept = {k: v for k, v in os.environ.items() if k in ("LORAPLEX_HOME",)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, **kept, "PYTHONUNBUFFERED": "1"},
    )
    reader = _Reader(process, log)
    try:
        url = reader.wait_for_url()
        yield Target(url, process.pid, "base")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()


class _Reader:
    """Copies the server's output to a file and finds its address in it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._url: str | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_url(self) -> str:
        self._ready.wait(_START_S)
        if self._url is None:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the server did not come up; the end of its log:\n{tail}")
        return self._url

    def join(self) -> None:
        self._thread.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _run(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("w") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                if (match := _URL.search(line)) is not None:
                    self._url = match[1]
                    self._ready.set()
        self._ready.set()
