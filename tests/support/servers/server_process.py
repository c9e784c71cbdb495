"""A real `loraplex serve` in a process of its own, on a free port of this machine."""

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.warm_python import ForkedProcess, WarmPython

_START_S = 180  # other work may hold the machine
_NOTHING: Mapping[str, str] = MappingProxyType({})
_URL = re.compile(r"serves .* at (http://\S+)")


def save_tiny_model(folder: Path, *, context: int = 4096) -> Path:
    """Save a random Llama of 300 tokens, with a tokenizer and a chat template."""
    tiny_model(eos_token_id=2, max_position_embeddings=context).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class ServerProcess:
    process: subprocess.Popen[str] | ForkedProcess
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """Return the exit status."""
        return self.process.wait(timeout_s)

    def read(self) -> None:
        """Collect the output. Runs in a thread until the process ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if (match := _URL.search(line)) is not None:
                self.url = match[1]
                self._ready.set()
        self._ready.set()

    def wait_until_ready(self) -> None:
        assert self._ready.wait(_START_S), self.log
        assert self.url, self.log


@contextmanager
def server_process(
    model: Path,
    state: Path,
    *flags: str | Path,
    warm: bool = True,
    environment: Mapping[str, str] = _NOTHING,
) -> Iterator[ServerProcess]:
    """Yield a server that is ready, and kill it at the end.

    ``warm``: the process is forked from one that has imported the server, which saves some six
    seconds of CPU time. Otherwise a new interpreter starts, as for users.
    """
    command = [
        *("serve", "--port", "0"),
        *("--model", str(model), "--state-dir", str(state), "--dtype", "float32"),
        *("--threads", "1", "--kv-memory", "8MiB", "--adapter-memory", "8MiB"),
        *(() if "--demos" in flags else ("--no-demos",)),
        *(str(flag) for flag in flags),
    ]
    with _started(command, warm=warm, added=environment) as server:
        server.wait_until_ready()
        yield server


def failing_start(*flags: str | Path) -> tuple[int, str]:
    """Return exit status and output of a `loraplex serve` that should not start."""
    with _started(["serve", *map(str, flags)], warm=True) as server:
        status = server.wait(_START_S)
    return status, server.log


def run_python(code: str, *arguments: str, timeout_s: float = 250) -> tuple[int, str]:
    """Run code in a fork of a process that has imported the server; return status and output."""
    process = _warm_python().start(arguments, _environment(), code)
    with process.stdout:
        output = process.stdout.read()
    return process.wait(timeout_s), output


@contextmanager
def _started(
    command: Sequence[str], *, warm: bool, added: Mapping[str, str] = _NOTHING
) -> Iterator[ServerProcess]:
    environment = {**_environment(), **added}
    if warm:
        server = ServerProcess(_warm_python().start(command, environment))
    else:
        server = ServerProcess(_new_interpreter(command, environment))
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        process = server.process
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(30)
        assert process.stdout is not None
        process.stdout.close()


@cache
def _warm_python() -> WarmPython:
    python = WarmPython(_environment())
    atexit.register(python.close)
    return python


def _new_interpreter(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex_server.cli.app", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(environment),
    )


def _environment() -> dict[str, str]:
    """Return this process's environment without options of the server.

    The working directory stays off the path: transformers would take the folder `kernels` for the
    package of that name, and look for its version in every installed file.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORAPLEX_")}
    return environment | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
