"""`ray start` on this machine, in a process that ends with this one.

    python -m loraplex_server.cluster.ray.ray_head start --head --block …

Ray ends if its agents take more than 15 s to write down their ports, as they do on a busy machine.
No setting changes that limit, so the ports are written down before the start.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_HOST = "127.0.0.1"
_N_TRIES = 3  # Ray gives up after 30 s, and another process may take a port first
_STOP_S = 60
_STARTED = "Ray runtime started"
_NO_PORT = -1  # of agents that nothing uses: Ray's dashboard and metrics
_PORTS = (
    "--port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)


@contextlib.contextmanager
def ray_head(
    folder: Path, *, n_cpus: int, object_store_bytes: int, on_end: Callable[[str], None]
) -> Iterator[str]:
    """Run Ray inside the block, with its files in ``folder``, and yield its address.

    ``on_end`` is called in another thread if Ray ends before the block does. Raises RuntimeError if
    Ray does not start.
    """
    for attempt in range(_N_TRIES):
        ports = _free_ports(len(_PORTS))
        log = folder / f"start-{attempt}.log"
        with _started(folder, ports, log, n_cpus, object_store_bytes) as process:
            if _is_up(process):
                with _noticed(process, on_end):
                    yield f"{_HOST}:{ports[0]}"
                return
        print("Ray has not started in its time; trying again", file=sys.stderr, flush=True)
    raise RuntimeError(f"Ray does not start: {log.read_text(errors='replace')[-2000:]}")


def prepare(parameters: Any, is_head: bool) -> None:  # of ray._private.parameter
    """Ray calls this hook in the new process, before it starts."""
    parameters.ray_client_server_port = None  # no remote clients
    # Private names of Ray: without them Ray starts in its own way.
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        node_id = os.urandom(28).hex()
        parameters.session_name = f"session_{os.getpid()}"
        parameters.env_vars = {
            **(parameters.env_vars or {}),
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
        }
        session = Path(parameters.temp_dir) / parameters.session_name
        session.mkdir(parents=True)
        ports = {
            raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME: _NO_PORT,
            raylet.METRICS_AGENT_PORT_NAME: _NO_PORT,
            raylet.METRICS_EXPORT_PORT_NAME: _NO_PORT,
            raylet.RUNTIME_ENV_AGENT_PORT_NAME: parameters.runtime_env_agent_port,
        }
        for name, port in ports.items():
            raylet.persist_port(str(session), node_id, name, port)


@contextlib.contextmanager
def _started(
    folder: Path, ports: list[int], log: Path, n_cpus: int, object_store_bytes: int
) -> Iterator[subprocess.Popen[str]]:
    options = [f"{option}={port}" for option, port in zip(_PORTS, ports, strict=True)]
    command = [
        *(sys.executable, "-m", __name__, "start", "--head", "--block", *options),
        *(f"--node-ip-address={_HOST}", f"--temp-dir={folder}"),
        *(f"--num-cpus={n_cpus}", f"--object-store-memory={object_store_bytes}"),
        *("--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"),
        "--disable-usage-stats",
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"RAY_START_HOOK": f"{__name__}.prepare"},
            start_new_session=True,  # Ctrl-C is ours: running requests finish first
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        _kill_session(process.pid)
        process.wait()
        process.stdout.close()


@contextlib.contextmanager
def _noticed(process: subprocess.Popen[str], on_end: Callable[[str], None]) -> Iterator[None]:
    """Call ``on_end`` when `ray start --block` ends, as it does when a process of Ray dies."""
    is_left = threading.Event()

    def wait() -> None:
        status = process.wait()
        if not is_left.is_set():
            on_end(f"Ray's head (process {process.pid}) has ended with status {status}")

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        is_left.set()


def _kill_session(leader: int) -> None:
    """Kill the processes that `ray start` could not end. They share its session."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                pids.append(int(folder.name))
    for pid in sorted(pids, key=lambda pid: pid == leader):  # it may be this process: last
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_up(process: subprocess.Popen[str]) -> bool:
    """Wait until Ray runs or has ended."""
    assert process.stdout is not None
    return any(_STARTED in line for line in process.stdout)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _end_with_input() -> None:
    """End this process when stdin closes, which means that the parent has ended."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)  # `ray start` ends its processes
    threading.Event().wait(_STOP_S)
    _kill_session(os.getpid())  # `ray start` waits for a process that is gone


if __name__ == "__main__":
    from ray.scripts.scripts import main

    threading.Thread(target=_end_with_input, daemon=True).start()
    sys.argv[0] = "ray"
    sys.exit(main())
