"""Which parts of the server fail: counted, and told in /health while they keep failing.

failed ──▶ counted ──(in a row)──▶ degraded ──(worked, or no failure for long)──▶ forgotten
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass

from loraplex_adapter_store.errors import CatalogueUnavailable

__all__ = ["PARTS", "Degradation", "Faults", "kind_of_fault", "part_of"]

# part → failures in a row from which it is degraded
PARTS = {
    "catalogue": 1,  # names and revisions; a write that failed is enough
    "storage": 1,  # files of adapters and uploads
    "loader": 3,  # adapters on their way to host and device memory
    "model": 3,  # steps of the engine, and its native calls
    "tokenizer": 3,
    "encoder": 3,  # of ``auto``
    "generator": 3,
    "server": 3,  # anything else that was not foreseen
}
_FORGET_S = 300.0  # after the last failure of a part that nobody has asked since


@dataclass(frozen=True, slots=True)
class Degradation:
    part: str
    problem: str  # the kind of the last failure: no message, which could hold paths or secrets
    since: float  # of the first failure in a row, in seconds since the epoch
    n_failures: int

    def to_json(self) -> dict[str, object]:
        return {
            "part": self.part,
            "problem": self.problem,
            "since": int(self.since),
            "failures": self.n_failures,
        }


@dataclass(slots=True)
class _Row:
    """The failures of a part since it last worked."""

    since: float
    n: int = 0
    problem: str = ""
    last: float = 0.0  # on the monotonic clock


class Faults:
    """A ``FaultLog``; owner of what failed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter(dict.fromkeys(PARTS, 0))
        self._rows: dict[str, _Row] = {}

    def failed(self, part: str, error: BaseException) -> None:
        with self._lock:
            row = self._current(part) or _Row(time.time())
            row.n, row.problem, row.last = row.n + 1, kind_of_fault(error), time.monotonic()
            self._rows[part] = row
            self._counts[part] += 1

    def unforeseen(self, error: BaseException) -> None:
        """An error that came up to the HTTP side. The catalogue has told of its own already."""
        part = part_of(error)
        if part != "catalogue":
            self.failed(part, error)

    def worked(self, part: str) -> None:
        if part in self._rows:  # seldom, so that success costs next to nothing
            with self._lock:
                self._rows.pop(part, None)

    @property
    def counts(self) -> dict[str, int]:
        """Failures of each part since the start."""
        with self._lock:
            return dict(self._counts)

    @property
    def degraded(self) -> tuple[Degradation, ...]:
        """The parts that keep failing, in the order of ``PARTS``."""
        with self._lock:
            rows = [(part, self._current(part)) for part in PARTS]
            return tuple(
                Degradation(part, row.problem, row.since, row.n)
                for part, row in rows
                if row is not None and row.n >= PARTS[part]
            )

    def _current(self, part: str) -> _Row | None:
        row = self._rows.get(part)
        return None if row is None or time.monotonic() - row.last > _FORGET_S else row


def part_of(error: BaseException) -> str:
    """Whose failure an error is that came up to the HTTP side unforeseen."""
    match error:
        case sqlite3.Error():
            return "catalogue"
        case OSError():
            return "storage"
        case _:
            return "loader" if _is_out_of_memory(error) else "server"


def kind_of_fault(error: BaseException) -> str:
    """For people, in a few words; never the message itself, nor a class: those are for the log."""
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


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has no exception of its own for it on a CPU."""
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
