"""Servers under test: how each kind starts and is asked, and how it is stopped."""

import os
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx

from .client import admin_client

BASE = "base"  # the base's name in requests to servers that we start
_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """A running server."""

    url: str
    pid: int | None = None  # None: not started by us, so its memory cannot be seen
    model: str = BASE
    api_key: str | None = None


class System(ABC):
    """A kind of server. Adapters are PEFT directories, each named as its directory."""

    name: ClassVar[str]

    def __init__(self, venv: Path | None = None) -> None:
        """``venv``: the environment of the server, if not this one."""
        self.venv = venv

    @abstractmethod
    def missing(self) -> str | None:
        """Return why the server cannot run here, or None."""

    @abstractmethod
    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        """Return arguments and extra environment. ``dtype`` as in torch; None: the server's choice.

        ``work`` is a folder for files of its own.
        """

    def prepare(self, model: Path, adapters: Sequence[Path], dtype: str | None, work: Path) -> None:
        """Write the files that `command` needs."""
        return

    @abstractmethod
    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        """Return the request fields that choose an adapter, or the base if ``name`` is None."""


class Loraplex(System):
    name = "loraplex"

    def __init__(self, options: Mapping[str, object] | None = None) -> None:
        """``options`` of `loraplex serve` override the defaults of load tests."""
        super().__init__()
        self._options = {key.replace("_", "-"): value for key, value in (options or {}).items()}

    def missing(self) -> str | None:
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        settings: dict[str, object] = {
            "model": model,
            "served-model-name": BASE,
            "state-dir": work / f"state-{port}",
            "log-level": "warning",
            "demos": False,
            **self._options,
            "port": port,
        }
        if dtype is not None:
            settings["dtype"] = dtype
        command = [sys.executable, "-m", "loraplex_server.cli.app", "serve"]
        for key, value in settings.items():
            if isinstance(value, bool):
                command.append(f"--{key}" if value else f"--no-{key}")
            else:
                command.append(f"--{key}={value}")
        command += [f"--lora-modules={path.name}={path}" for path in adapters]
        return command, {"PYTHONUNBUFFERED": "1"}

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        return {"model": BASE} if name is None else {"model": BASE, "adapter": name}


def running_target(url: str, api_key: str | None) -> Target:
    """Return a server that is already running. Raises RuntimeError if it does not answer."""
    with admin_client(url, api_key) as client:
        try:
            response = client.get("/v1/models")
        except httpx.HTTPError as error:
            raise RuntimeError(f"{url} does not answer: {error}") from error
        if response.status_code != 200:
            text = response.text[:300]
            raise RuntimeError(f"GET {url}/v1/models answered {response.status_code}: {text}")
        # The first model of the list is the base.
        return Target(url.rstrip("/"), None, response.json()["data"][0]["id"], api_key)


@contextmanager
def started(
    system: System,
    model: Path,
    adapters: Sequence[Path],
    work: Path,
    *,
    dtype: str | None = None,
) -> Iterator[Target]:
    """Start a server and stop it when left; its output goes to ``work/NAME.log``.

    Raises RuntimeError with the end of the log if it does not come up.
    """
    system.prepare(model, adapters, dtype, work)
    port = _free_port()
    command, extra = system.command(model, adapters, port, dtype, work)
    # Settings of the user's own server must not reach ours; where pulled models lie, must.
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("LORAPLEX_") or key == "LORAPLEX_HOME"
    }
    log_path = work / f"{system.name}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**environment, **extra}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, log_path)
        yield Target(url, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # it does not listen yet
        try:
            process.wait(0.2)
            break  # it has died
        except subprocess.TimeoutExpired:
            pass
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the server did not come up at {url}; the end of {log.name}:\n{tail}")
