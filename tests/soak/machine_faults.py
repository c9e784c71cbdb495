"""Failures of the machine under a running server: a full or slow disk, a catalogue that is gone.

The server writes to a small disk of its own. Without the right to mount one, its files may grow no
further while the disk is full.
"""

import asyncio
import errno
import random
import resource
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from .chaos import Chaos

_DISK_BYTES = 256 << 20
_SYNC_S = 0.3  # of a slow disk
_SHIM = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static void wait_if_slow(void) {
    if (access(getenv("SLOW_DISK"), F_OK) == 0) usleep(%d);
}
int fsync(int file) { wait_if_slow(); return syscall(SYS_fsync, file); }
int fdatasync(int file) { wait_if_slow(); return syscall(SYS_fdatasync, file); }
"""


class SmallDisk:
    """A folder whose disk can be full, and slow for the processes with its ``environment``."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder / "disk"
        self.folder.mkdir()
        self._slow, shim = folder / "slow", folder / "slow_disk.so"
        source = _SHIM % (_SYNC_S * 1e6)
        compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(shim), "-"]
        subprocess.run(compiler, input=source, text=True, check=True)
        self.environment = {"LD_PRELOAD": str(shim), "SLOW_DISK": str(self._slow)}
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "soak", str(self.folder)]
        self._is_mounted = subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
        if self._is_mounted:
            stack.callback(subprocess.run, ["umount", "--lazy", str(self.folder)], check=True)

    @contextmanager
    def full(self, pid: int) -> Iterator[None]:
        if not self._is_mounted:
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
            try:
                yield
            finally:
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
            return
        filler = self.folder / "filler"
        try:
            _fill(filler)
            yield
        finally:
            filler.unlink(missing_ok=True)

    @contextmanager
    def slow(self) -> Iterator[None]:
        self._slow.touch()
        try:
            yield
        finally:
            self._slow.unlink()


class Gate:
    """A proxy of an object store that can be shut."""

    def __init__(self, endpoint: str) -> None:
        self._target = urlsplit(endpoint)
        self._is_shut = False
        self._open: set[asyncio.StreamWriter] = set()
        self.url = ""

    async def open(self) -> asyncio.Server:
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    @contextmanager
    def shut(self) -> Iterator[None]:
        self._is_shut = True
        for writer in self._open:
            writer.transport.abort()
        try:
            yield
        finally:
            self._is_shut = False

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_shut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._open |= {writer, there[1]}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_copy(reader, there[1]))
                group.create_task(_copy(there[0], writer))
        finally:
            self._open -= {writer, there[1]}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


class MachineFaults:
    """Breaks one thing at a time, for some seconds, under the server of ``chaos``."""

    def __init__(self, chaos: Chaos, disk: SmallDisk, gate: Gate | None) -> None:
        self._chaos, self._disk, self._gate = chaos, disk, gate

    async def run(self, choices: random.Random, pid: int) -> None:
        """Run until cancelled, which repairs everything."""
        chaos = self._chaos
        while True:
            await asyncio.sleep(choices.uniform(3, 8))
            fault = choices.choice(("full", "slow") if self._gate is None else ("gone", "slow"))
            chaos.counts[f"faults: {fault}"] += 1
            with ExitStack() as stack:
                if fault == "slow":
                    stack.enter_context(self._disk.slow())
                else:
                    stack.enter_context(chaos.failing())
                if fault == "full":
                    stack.enter_context(self._disk.full(pid))
                elif self._gate is not None and fault == "gone":
                    stack.enter_context(self._gate.shut())
                await asyncio.sleep(choices.uniform(2, 6))


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            while True:
                try:
                    file.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    break
