"""Processes that start in a tenth of the time, as forks of one that has imported `loraplex`.

`WarmPython` starts this file as a program. The program imports what a server needs, then forks
once for each request. A fork has the arguments, environment, folder and output that the request
names, and runs the command line's ``main``, or other code, as a new interpreter would.
"""

import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_PRELOADED = (
    "loraplex_server.cli.app",
    "loraplex_server.launch",
    "loraplex_server.front",
    "loraplex_server.api.app",
    "loraplex_server.engine.build",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.loops.uvloop",
    "uvicorn.lifespan.off",
)
_STATUS = struct.Struct("i")
_MAX_REQUEST = 1 << 20


class ForkedProcess:
    """A running fork, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: socket.socket, output: int) -> None:
        self.pid = pid
        self.stdout = os.fdopen(output, encoding="utf-8", errors="replace")
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the process runs."""
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises TimeoutExpired."""
        if self._read(timeout) is None:
            raise subprocess.TimeoutExpired(["loraplex"], timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            (code,) = _STATUS.unpack(self._status.recv(_STATUS.size))
            self._status.close()
            self.returncode = os.waitstatus_to_exitcode(code)
        return self.returncode


class WarmPython:
    """The process that forks, started when first needed; it ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment`` applies to what is imported once, as OMP_NUM_THREADS."""
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], code: str = ""
    ) -> ForkedProcess:
        """Run `loraplex`, or ``code``, with these arguments; errors go to the output, too.

        ``code`` can import what the working directory holds, as with ``python -c``.
        """
        output, their_output = os.pipe()
        status, their_status = socket.socketpair()
        request = {"arguments": list(arguments), "environment": dict(environment), "code": code}
        message = json.dumps({**request, "folder": os.getcwd()}).encode()
        assert len(message) < _MAX_REQUEST
        socket.send_fds(self._requests, [message], [their_output, their_status.fileno()])
        os.close(their_output)
        their_status.close()
        message = status.recv(_STATUS.size)
        assert message, "the process that forks has died"
        (pid,) = _STATUS.unpack(message)
        return ForkedProcess(pid, status, output)

    def close(self) -> None:
        self._requests.close()
        self._process.wait(30)


def _serve_forks(requests: socket.socket) -> str:
    """Fork for each request until the tests end. Returns the code to run, in each fork."""
    for name in _PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the first forks
    while True:
        message, files, _, _ = socket.recv_fds(requests, _MAX_REQUEST, 2)
        if not message:
            os._exit(0)
        output, status = files
        if os.fork() == 0:
            requests.close()
            _wait_for_a_fork(status)
            os.close(status)
            request = json.loads(message)
            _take_on(request, output)
            return str(request["code"])
        os.close(output)
        os.close(status)


def _wait_for_a_fork(status: int) -> None:
    """Fork once more and return in the fork. Reports the fork's id, then its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the fork, and that ends this
    os.closerange(0, status)
    os.closerange(status + 1, 256)
    os.write(status, _STATUS.pack(pid))
    os.write(status, _STATUS.pack(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _take_on(request: Mapping[str, Any], output: int) -> None:
    """Become a process that was started with this command line, environment and output."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["loraplex", *request["arguments"]]
    if request["code"]:
        sys.path.insert(0, request["folder"])


if __name__ == "__main__":
    if code := _serve_forks(socket.socket(fileno=int(sys.argv[1]))):
        exec(code, {"__name__": "__main__"})
    else:
        from loraplex_server.cli.app import main

        main()
