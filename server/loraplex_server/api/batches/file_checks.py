"""Checks uploaded files in worker processes, where they delay no other request."""

import os
from pathlib import Path

from loraplex_server.errors import ApiError, invalid, unavailable
from loraplex_server.worker_processes.pool import (
    CallFailed,
    CallRaised,
    CallTooSlow,
    WorkerProcesses,
    WorkersBusy,
)

from . import input_file
from .records import InputSummary

_CPU_S = 60.0  # 200 MiB take at most some three seconds
_MAX_S = 300.0  # wall time, for a machine without a free processor
_NICE = 5  # requests go first
CHECKS = {"batch": input_file.check_input, "fine-tune": input_file.check_training_file}


class FileChecks:
    """The file checks of one server. Event loop only.

    A tenant checks one file at a time, so its files occupy at most one process.
    """

    def __init__(self) -> None:
        self._workers = WorkerProcesses(
            "files",
            max_wait_s=_MAX_S,
            preload=[input_file.__name__],
            prepare=(os.nice, [_NICE]),
        )

    async def check(
        self, path: Path, tenant: str, purpose: str, *, max_lines: int, max_line_bytes: int
    ) -> InputSummary:
        """Check the file and flush it to the disk. Cancelling ends the process.

        ``purpose`` is a key of ``CHECKS``.
        Raises ApiError: 400 for the file, 503 if no worker process is free, 429 if too many files
        of the tenant wait.
        """
        try:
            async with self._workers.turn_of(tenant):
                n_lines, endpoints = await self._workers.run(
                    CHECKS[purpose],
                    [str(path), max_lines, max_line_bytes],
                    timeout_s=_MAX_S,
                    cpu_s=_CPU_S,
                )
        except (WorkersBusy, CallTooSlow) as error:
            raise unavailable(f"the file was not checked: {error}", "files_busy") from error
        except CallRaised as error:
            if error.type_name != ApiError.__name__:
                raise  # our own bug
            raise invalid(str(error), "file", "invalid_file") from error
        except CallFailed as error:
            problem = f"the file cannot be checked, split it: {error}"
            raise invalid(problem, "file", "invalid_file") from error
        return InputSummary(n_lines, tuple(endpoints))

    async def close(self) -> None:
        await self._workers.close()
