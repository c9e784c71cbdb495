"""The health of the server's parts, read from its own log.

A failure of a part is a log record at level ERROR with ``extra={"part": …}``, and ``part_log``
reports its successes. ``HealthTracker`` counts failures for /metrics, and /health names the parts
that keep failing.
"""

import contextlib
import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loraplex_adapter_store.errors import CatalogueUnavailable
from loraplex_adapter_store.part_log import PART_LOG

# part → number of failures in a row from which the part is degraded
PARTS = {
    "catalogue": 1,  # names and revisions; one failed write is enough
    "storage": 1,  # files of adapters and uploads
    "loader": 3,  # loads of adapters to host and device memory
    "model": 3,  # steps of the engine
    "tokenizer": 3,
    "encoder": 3,  # the sentence encoder behind ``auto``
    "generator": 3,
    "server": 3,  # every other unexpected error; no success ends it
}
_RECOVERED_S = 60.0  # after the last failure of a part that was not used since


@dataclass(frozen=True, slots=True)
class Degradation:
    """A part of the server that keeps failing."""

    part: str
    problem: str  # the kind of the last failure; its message could hold paths or secrets
    since: float  # time of the first failure, in seconds since the epoch
    n_failures: int

    def to_json(self) -> dict[str, object]:
        return {
            "part": self.part,
            "problem": self.problem,
            "since": int(self.since),
            "failures": self.n_failures,
        }


class HealthTracker(logging.Handler):
    """A logging handler that counts the failures of each part. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._counts = Counter(dict.fromkeys(PARTS, 0))
        self._streaks: dict[str, tuple[Degradation, float]] = {}  # with the time of the last one

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Receives the log records of the whole process while the context is open."""
        root, parts = logging.getLogger(), logging.getLogger(PART_LOG)
        parts.setLevel(logging.DEBUG)
        parts.propagate = False  # successes are not for the operator's log
        root.addHandler(self)
        parts.addHandler(self)
        try:
            yield
        finally:
            parts.removeHandler(self)
            root.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Called under the handler's lock."""
        part = getattr(record, "part", None)
        if record.name == PART_LOG:
            self._streaks.pop(str(part), None)
        if part not in PARTS or record.levelno < logging.ERROR:
            return
        self._counts[part] += 1
        streak = self._streak(part) or Degradation(part, "", time.time(), 0)
        streak = replace(
            streak, problem=kind_of_failure(_error_in(record)), n_failures=streak.n_failures + 1
        )
        self._streaks[part] = (streak, self._clock())

    @property
    def counts(self) -> dict[str, int]:
        """The failures of each part since the start."""
        return dict(self._counts)

    @property
    def degraded(self) -> tuple[Degradation, ...]:
        """The parts that keep failing, in the order of ``PARTS``."""
        streaks = (self._streak(part) for part in PARTS)
        return tuple(
            streak
            for streak in streaks
            if streak is not None and streak.n_failures >= PARTS[streak.part]
        )

    def _streak(self, part: str) -> Degradation | None:
        streak, last = self._streaks.get(part, (None, 0.0))
        return None if self._clock() - last > _RECOVERED_S else streak


def part_of(error: BaseException) -> str:
    """The part that an unexpected error belongs to."""
    match error:
        case sqlite3.Error():
            return "catalogue"
        case OSError():
            return "storage"
        case _:
            return "loader" if _is_out_of_memory(error) else "server"


def log_extra(error: BaseException) -> dict[str, str]:
    """The ``extra`` of the log record of an unexpected error.

    Errors of SQLite name no part here: the registry has logged them with their part.
    """
    part = part_of(error)
    return {} if part == "catalogue" else {"part": part}


def kind_of_failure(error: BaseException | None) -> str:
    """Return a short description for clients. The error's message and class are only logged."""
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", None) or ""
        return _SQLITE.get(name.removeprefix("SQLITE_").partition("_")[0], "a database error")
    if isinstance(error, CatalogueUnavailable):
        return "the object store cannot be used"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if _is_out_of_memory(error):
        return "out of memory"
    return "an unexpected error"


def _error_in(record: logging.LogRecord) -> BaseException | None:
    """The exception of a record: ``exc_info``, or an argument of the message."""
    if record.exc_info:
        return record.exc_info[1]
    arguments = record.args if isinstance(record.args, tuple) else ()
    return next((each for each in arguments if isinstance(each, BaseException)), None)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return True for out-of-memory errors. For CPU memory, torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError"  # of a GPU
            or "DefaultCPUAllocator" in str(error)
        )
    )


_SQLITE = {
    "BUSY": "locked by another process",
    "LOCKED": "locked by another process",
    "FULL": "no space left on device",
    "READONLY": "read-only",
    "IOERR": "input/output error",
    "CORRUPT": "the database file is damaged",
    "CANTOPEN": "the database file cannot be opened",
}
