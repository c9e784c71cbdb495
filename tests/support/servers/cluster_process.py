"""Starts real clusters in processes of their own, on a free port of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SERVE = str(Path(sys.executable).with_name("serve"))  # Ray's command
LORAPLEX = (sys.executable, "-m", "loraplex_server.cli.app")

_START_S = 900  # other work may hold the machine
_STOP_S = 300
_MARK = "LORAPLEX_TEST_CLUSTER"  # in the environment of all processes of one cluster


@dataclass
class ClusterProcess:
    process: subprocess.Popen[str]
    config_file: Path
    url: str
    mark: str
    environment: dict[str, str]
    lines: list[str] = field(default_factory=list)
    _said: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, *, n_before: int = 0) -> None:
        """Wait until a line after the first ``n_before`` contains ``text``."""

        def there() -> bool:
            return self._ended or any(text in line for line in self.lines[n_before:])

        with self._said:
            self._said.wait_for(there, _START_S)
        assert any(text in line for line in self.lines[n_before:]), self.log

    def upgrade(self, config: Mapping[str, Any]) -> None:
        """Rewrite the config file and wait until the cluster has applied it."""
        n_before = len(self.lines)
        self.config_file.write_text(json.dumps(config))
        self.process.send_signal(signal.SIGHUP)
        self.wait_for("upgraded", n_before=n_before)

    def say(self, subcommand: str) -> str:
        """Return the output of `loraplex cluster SUBCOMMAND`, run from another terminal."""
        command = [*LORAPLEX, "cluster", subcommand]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=_STOP_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shut_serve_down(self) -> None:
        """Shut Ray Serve down from another process on the Ray of ``environment``."""
        done = "import ray, ray.serve; ray.init(namespace='serve'); ray.serve.shutdown()"
        command = [sys.executable, "-c", done]
        subprocess.run(command, check=True, env=self.environment, timeout=_STOP_S)

    def replicas(self, deployment: str) -> dict[int, str]:
        """Return the titles of a deployment's live replicas by process id."""
        return {
            pid: title
            for pid, title in processes_of(self.mark).items()
            if f"ServeReplica:loraplex:{deployment}" in title
        }

    def ended(self) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(_STOP_S)

    def read(self) -> None:
        """Collect the output. Runs in a thread until the process ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()
        with self._said:
            self._ended = True
            self._said.notify_all()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def cluster_process(
    config: dict[str, Any], folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[ClusterProcess]:
    """Yield a cluster that is ready. At the end it stops in good order and leaves no process.

    A cluster that has ended before was ended by the test, which checks the status.
    """
    with marked_environment(folder, variables) as (mark, environment):
        with joined_cluster(config, folder, mark, environment) as cluster:
            yield cluster
        assert not processes_of(mark)


@contextmanager
def joined_cluster(
    config: dict[str, Any], folder: Path, mark: str, environment: dict[str, str]
) -> Iterator[ClusterProcess]:
    """Run `loraplex cluster up`. A Ray cluster that it joins outlives it."""
    command = [*LORAPLEX, "cluster", "up"]
    with _up(command, config, folder, mark, environment) as cluster:
        yield cluster


@contextmanager
def serve_run(
    config: dict[str, Any], folder: Path, mark: str, environment: dict[str, str]
) -> Iterator[ClusterProcess]:
    """Run a cluster by Ray's own `serve` on the Ray of ``environment``, until the block ends."""
    port = config["server"]["port"]
    start = [_SERVE, "start", f"--http-port={port}", "--proxy-location=HeadOnly"]
    subprocess.run(start, check=True, env=environment, timeout=_START_S)
    command = [_SERVE, "run", "--name=loraplex", "loraplex_server.cluster:app"]
    with _up(command, config, folder, mark, environment, argument="config=") as cluster:
        yield cluster
        cluster.process.send_signal(signal.SIGINT)  # its SIGTERM leaves the application
        assert cluster.ended() == 0, cluster.log


@contextmanager
def marked_environment(
    folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a mark and an environment that has it. Processes with the mark end with the block."""
    mark = uuid.uuid4().hex
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORAPLEX_", "RAY_"))}
    try:
        yield (
            mark,
            {
                **kept,
                _MARK: mark,
                "LORAPLEX_HOME": str(folder / "home"),
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                **(variables or {}),
            },
        )
    finally:
        for pid in processes_of(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def _up(
    command: list[str],
    config: dict[str, Any],
    folder: Path,
    mark: str,
    environment: dict[str, str],
    *,
    argument: str = "",
) -> Iterator[ClusterProcess]:
    port = config["server"].setdefault("port", free_port())
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    process = subprocess.Popen(
        [*command, f"{argument}{file}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    cluster = ClusterProcess(process, file, f"http://127.0.0.1:{port}", mark, environment)
    reader = threading.Thread(target=cluster.read, daemon=True)
    reader.start()
    try:
        cluster.wait_for(f"http://127.0.0.1:{port}")  # it says where it serves
        yield cluster
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(_STOP_S) == 0, cluster.log
    finally:
        process.kill()
        process.wait(_STOP_S)
        reader.join(30)
        assert process.stdout is not None
        process.stdout.close()


def processes_of(mark: str) -> dict[int, str]:
    """Return the command lines of processes with this mark, by process id."""
    found = {}
    wanted = f"{_MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if title:  # a process that has ended has none
                    found[int(folder.name)] = title
        except (OSError, UnicodeDecodeError):
            continue
    return found
