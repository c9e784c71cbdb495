"""A real `loraplex serve` in a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.architectures import tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

__all__ = ["ServerProcess", "failing_start", "save_tiny_model", "server_process"]

_START_S = 180  # other work may hold the machine
_URL = re.compile(r"serves .* at (http://\S+)")


def save_tiny_model(folder: Path, *, context: int = 4096) -> Path:
    """A random Llama of 300 tokens with a tokenizer and a chat template."""
    tiny_model(eos_token_id=2, max_position_embeddings=context).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit status."""
        return self.process.wait(timeout_s)

    def read(self) -> None:
        """Runs in a thread until the process ends."""
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
def server_process(model: Path, state: Path, *flags: str | Path) -> Iterator[ServerProcess]:
    """Ready when entered, gone when left."""
    command = [
        *(sys.executable, "-m", "loraplex_server.cli.app", "serve", "--port", "0"),
        *("--model", str(model), "--state-dir", str(state), "--dtype", "float32"),
        *("--threads", "1", "--kv-memory", "8MiB", "--adapter-memory", "8MiB"),
        *(() if "--demos" in flags else ("--no-demos",)),
        *(str(flag) for flag in flags),
    ]
    with _started(command) as server:
        server.wait_until_ready()
        yield server


def failing_start(*flags: str | Path) -> tuple[int, str]:
    """Exit status and output of a `loraplex serve` that should not start."""
    command = [sys.executable, "-m", "loraplex_server.cli.app", "serve", *map(str, flags)]
    with _started(command) as server:
        status = server.wait(_START_S)
    return status, server.log


@contextmanager
def _started(command: Sequence[str]) -> Iterator[ServerProcess]:
    """Without this folder on its path: transformers takes `kernels` for the package of that name,
    and looks for its version in every file that is installed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LORAPLEX_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    server = ServerProcess(process)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(30)
        assert process.stdout is not None
        process.stdout.close()
