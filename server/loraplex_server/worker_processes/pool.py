"""Runs calls that a client's input can make endless or huge, in processes that can be killed.

    workers = WorkerProcesses("templates")
    async with workers.turn_of(tenant):
        text = await workers.run(render, [template, messages], timeout_s=2)

A function is a top-level function of a module that imports little. Arguments and result are JSON.
multiprocessing and pebble would import the server's main module (and PyTorch) into each worker,
unpickle a worker's answers, and detect timeouts by polling in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import orjson

from loraplex_server.tenant_shares import TenantShares

T = TypeVar("T")
_START_S = 60.0
_CHILD = "loraplex_server.worker_processes.child"


class CallFailed(Exception):
    """A call without a result.

    CallFailed
    ├── CallRaised    the function raised an error
    ├── CallTooLong   the call used up its CPU time and was killed
    │   └── CallTooSlow   the call used up its time, perhaps because the machine is busy
    ├── CallTooLarge  the call needed too much memory, or its result is too long
    └── WorkersBusy   no worker is free in time, or none starts
    """


class CallRaised(CallFailed):
    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(text)
        self.type_name = type_name


class CallTooLong(CallFailed): ...


class CallTooSlow(CallTooLong): ...


class CallTooLarge(CallFailed): ...


class WorkersBusy(CallFailed): ...


class WorkerProcesses:
    """A pool of worker processes. Event loop only. One spare process is ready for the next call.

    The tenants share the workers fairly. At most ``max_waiting`` calls of a tenant wait for a
    worker, each at most ``max_wait_s``.
    """

    def __init__(
        self,
        name: str,
        *,
        n_workers: int = 2,
        max_waiting: int = 64,
        max_wait_s: float = 10.0,
        memory_bytes: int = 1 << 30,
        answer_bytes: int = 16 << 20,
        preload: Sequence[str] = (),
        prepare: tuple[Callable[..., object], Sequence[object]] | None = None,
        files: Sequence[int] = (),
    ) -> None:
        """``name`` is the plural of a call in errors.

        A process imports the modules ``preload`` and calls ``prepare`` before it is ready.
        ``prepare`` is a function with its arguments, and has no time limit. A process inherits the
        open file descriptors ``files``.
        """
        self._turns = TenantShares(name, n_workers, 1, max_waiting=max_waiting)
        self._max_wait_s = max_wait_s
        first = None if prepare is None else [_path(prepare[0]), prepare[1]]
        self._arguments = (
            str(memory_bytes),
            str(answer_bytes),
            orjson.dumps(first).decode(),
            *preload,
        )
        self._files = files
        self._idle: list[_Worker] = []
        self._ending: set[asyncio.Future[int]] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def turn_of(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a worker. Each tenant has one at a time, for the calls within the block.

        Raises WorkersBusy if none is free for ``max_wait_s``, and ApiError (429) if too many calls
        of the tenant wait.
        """
        try:
            async with asyncio.timeout(self._max_wait_s):  # wait_for can lose a cancellation
                await self._turns.acquire(tenant)
        except TimeoutError:
            raise WorkersBusy(
                f"no worker process was free for {self._max_wait_s:g} s; try again later"
            ) from None
        try:
            yield
        finally:
            self._turns.release(tenant)

    async def run(
        self,
        function: Callable[..., T],
        args: Sequence[object],
        *,
        timeout_s: float,
        cpu_s: float | None = None,
    ) -> T:
        """Run a call within the block of ``turn_of``, and return its result. Raises CallFailed.

        Times count from the start of the call in a ready process. ``cpu_s`` (by default
        ``timeout_s``) is rounded up to whole seconds. A cancelled or failed call ends its process.
        """
        try:
            frame = orjson.dumps([_path(function), args, timeout_s if cpu_s is None else cpu_s])
        except orjson.JSONEncodeError as error:  # the arguments nest too deep
            raise CallRaised("JSONEncodeError", str(error)) from None
        await asyncio.sleep(0)  # encoding megabytes took time: let other tasks run
        reusable = False
        worker = None
        try:
            worker = self._next()
            await worker.ready()
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await worker.call(frame)
            except TimeoutError:
                raise CallTooSlow(f"took longer than {timeout_s:g} s") from None
            reusable = answer[0] != "too large"  # the memory may not be returned
        finally:
            if worker and reusable and not self._closed:
                self._idle.append(worker)
            elif worker:
                self._end(worker)
        result: T = _result(answer)
        return result

    def start(self) -> None:
        """Start a process for the first ``run`` without waiting for it."""
        self._idle.append(_Worker(self._arguments, self._files))

    async def close(self) -> None:
        """End all idle processes. Busy processes end with their call."""
        self._closed = True
        while self._idle:
            self._end(self._idle.pop())
        await asyncio.gather(*self._ending)

    def _next(self) -> _Worker:
        """Return a process, and start a spare one for the next call."""
        for dead in [worker for worker in self._idle if not worker.alive]:
            self._idle.remove(dead)
            self._end(dead)
        worker = self._idle.pop() if self._idle else _Worker(self._arguments, self._files)
        if not self._idle:
            self._idle.append(_Worker(self._arguments, self._files))
        return worker

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        ending = asyncio.get_running_loop().run_in_executor(None, worker.wait)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


class _Worker:
    """A process and the server's end of its socket. Started without an await, so none is lost."""

    def __init__(self, arguments: Sequence[str], files: Sequence[int]) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._ready = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", "-m", _CHILD, *arguments],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                pass_fds=files,
                env={  # without the server's secrets
                    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                    "OPENBLAS_NUM_THREADS": "1",  # each thread would use address space
                },
                start_new_session=True,  # Ctrl-C must not reach the worker
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def ready(self) -> None:
        """Wait until the process is ready. Raises WorkersBusy if it does not start."""
        if self._ready:
            return
        try:
            async with asyncio.timeout(_START_S):
                await self._receive(1)
        except (TimeoutError, EOFError, ConnectionError):
            raise WorkersBusy("no worker process starts; try again later") from None
        self._ready = True

    async def call(self, frame: bytes) -> list[object]:
        """Send a call and return its answer. Raises CallFailed if the process ended."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, len(frame).to_bytes(4, "big"))
            await loop.sock_sendall(self._socket, frame)
            length = int.from_bytes(await self._receive(4), "big")
            answer: list[object] = orjson.loads(await self._receive(length))
        except (EOFError, ConnectionError):
            if await loop.run_in_executor(None, self.wait) == -signal.SIGXCPU:
                raise CallTooLong("took too much CPU time") from None
            raise CallTooLarge("the process ended: it ran out of stack or memory") from None
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._socket.close()

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status. Blocks."""
        return self._process.wait()

    async def _receive(self, n_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < n_bytes:
            part = await loop.sock_recv(self._socket, min(n_bytes - len(data), 1 << 18))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def _path(function: Callable[..., object]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _result(answer: list[object]) -> Any:
    match answer:
        case ["value", value]:
            return value
        case ["raised", str(type_name), str(text)]:
            raise CallRaised(type_name, text)
        case ["too large", str(text)]:
            raise CallTooLarge(text)
    raise CallTooLarge("the process sent no answer")
