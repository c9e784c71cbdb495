"""Calls that a client's input may make endless or huge, in processes that can be killed.

    workers = WorkerProcesses()
    text = await workers.run(render, [template, messages], timeout_s=2)

A function is a top-level one of a module that imports little; arguments and result are JSON. Why
not multiprocessing or pebble: they import the server's main module (and PyTorch) into each worker,
unpickle what a worker says, and notice a timeout by polling in threads.
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
from weakref import WeakValueDictionary

import orjson

__all__ = [
    "CallFailed",
    "CallRaised",
    "CallTooLarge",
    "CallTooLong",
    "CallTooSlow",
    "WorkerProcesses",
    "WorkersBusy",
]

T = TypeVar("T")
_START_S = 60.0
_CHILD = "loraplex_server.worker_child"


class CallFailed(Exception):
    """The call gave no result; the server and other calls go on.

    CallFailed
    ├── CallRaised    the function raised: its own error
    ├── CallTooLong   over its CPU time; the process was killed
    │   └── CallTooSlow   over its time: also where the machine gave it no processor
    ├── CallTooLarge  over its memory or length of result
    └── WorkersBusy   nothing was tried: all workers are taken, or none starts
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
    """Used on one event loop. Processes start with the first call; one more than is busy.

    ``max_waiting`` calls may wait for a worker, each at most ``max_wait_s``.
    """

    def __init__(
        self,
        *,
        n_workers: int = 2,
        max_waiting: int = 64,
        max_wait_s: float = 10.0,
        memory_bytes: int = 1 << 30,
        answer_bytes: int = 16 << 20,
        preload: Sequence[str] = (),
        prepare: tuple[Callable[..., object], Sequence[object]] | None = None,
    ) -> None:
        """``preload``: modules that a process imports before it counts as started.

        ``prepare``: a function that it calls then, and its arguments, without limits of time.
        """
        self._turns = asyncio.Semaphore(n_workers)
        self._turns_of: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._n_waiting = 0
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        first = None if prepare is None else [_path(prepare[0]), prepare[1]]
        self._arguments = (
            str(memory_bytes),
            str(answer_bytes),
            orjson.dumps(first).decode(),
            *preload,
        )
        self._idle: list[_Worker] = []
        self._ending: set[asyncio.Future[int]] = set()
        self._closed = False

    @contextlib.asynccontextmanager
    async def turn_of(self, tenant: str) -> AsyncIterator[None]:
        """To ``run`` in: one at a time for each tenant, so that none takes all processes.

        Raises WorkersBusy when the tenant's other calls last longer than ``max_wait_s``.
        """
        turn = self._turns_of.setdefault(tenant, asyncio.Lock())
        try:
            async with asyncio.timeout(self._max_wait_s):
                await turn.acquire()
        except TimeoutError:
            raise WorkersBusy(
                f"other calls of the same tenant took {self._max_wait_s:g} s; try again later"
            ) from None
        try:
            yield
        finally:
            turn.release()

    async def run(
        self,
        function: Callable[..., T],
        args: Sequence[object],
        *,
        timeout_s: float,
        cpu_s: float | None = None,
    ) -> T:
        """Raises CallFailed. A cancelled or failed call ends its process; a spare is ready.

        Times count from when a process that is ready begins the call. The CPU time, by default
        ``timeout_s``, is rounded up to whole seconds.
        """
        try:
            frame = orjson.dumps([_path(function), args, timeout_s if cpu_s is None else cpu_s])
        except orjson.JSONEncodeError as error:  # they nest too deep
            raise CallRaised("JSONEncodeError", str(error)) from None
        await asyncio.sleep(0)  # another's turn: writing megabytes took some
        await self._turn()
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
            reusable = answer[0] != "too large"  # its memory may not come back
        finally:
            self._turns.release()
            if worker and reusable and not self._closed:
                self._idle.append(worker)
            elif worker:
                self._end(worker)
        result: T = _result(answer)
        return result

    def start(self) -> None:
        """Starts a process for the first ``run``, and does not wait for it."""
        self._idle.append(_Worker(self._arguments))

    async def close(self) -> None:
        """Ends all idle processes; those that work end with their call."""
        self._closed = True
        while self._idle:
            self._end(self._idle.pop())
        await asyncio.gather(*self._ending)

    async def _turn(self) -> None:
        if self._turns.locked() and self._n_waiting >= self._max_waiting:
            raise WorkersBusy(f"{self._n_waiting} calls wait for a worker process; try again later")
        self._n_waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):  # wait_for may swallow a cancellation
                await self._turns.acquire()
        except TimeoutError:
            raise WorkersBusy("all worker processes are taken; try again later") from None
        finally:
            self._n_waiting -= 1

    def _next(self) -> _Worker:
        """A process that is ready, while another starts for the next call that needs one."""
        for dead in [worker for worker in self._idle if not worker.alive]:
            self._idle.remove(dead)
            self._end(dead)
        worker = self._idle.pop() if self._idle else _Worker(self._arguments)
        if not self._idle:
            self._idle.append(_Worker(self._arguments))
        return worker

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        ending = asyncio.get_running_loop().run_in_executor(None, worker.wait)
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


class _Worker:
    """A process and our end of its socket; started without an await, so that none is lost."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._ready = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", "-m", _CHILD, *arguments],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env={  # nothing secret
                    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                    "OPENBLAS_NUM_THREADS": "1",  # each would take of the address space
                },
                start_new_session=True,  # Ctrl-C is for the server
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def ready(self) -> None:
        """Raises WorkersBusy when the process does not start."""
        if self._ready:
            return
        try:
            async with asyncio.timeout(_START_S):
                await self._receive(1)
        except (TimeoutError, EOFError, ConnectionError):
            raise WorkersBusy("no worker process starts; try again later") from None
        self._ready = True

    async def call(self, frame: bytes) -> list[object]:
        """Raises CallFailed when the process ended."""
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
        """Blocks until the kernel has taken the process away. Its exit status."""
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
