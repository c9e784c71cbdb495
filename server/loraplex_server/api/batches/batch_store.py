"""Files, batches and the answers of their lines: SQLite and a folder of files.

    upload ──▶ files/ID ──▶ row            an answer ──▶ row of (batch, line), once
    last answer ──▶ files/OUTPUT, files/ERRORS ──▶ rows, batch ended, answers gone (one transaction)

A file without a row is what a crash has left, and is removed at the next start.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from loraplex_server.api.errors import ApiError, invalid
from loraplex_server.api.request_info import BatchCaller

from .batch_tables import (
    BatchTables,
    advance,
    batch_of,
    file_of,
    insert_file,
    json_text,
    page,
    row_by_id,
)
from .input_file import InputLine, InputSummary, read_lines
from .records import BatchRecord, BatchStatus, FileRecord

__all__ = ["BatchLimits", "BatchStore", "answer_record"]

_WINDOW_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Of a tenant."""

    max_files: int = 1000
    max_bytes: int = 4 << 30  # of all its files; answers of running batches come on top
    max_lines: int = 50_000  # of a file
    max_active: int = 16  # batches that have not ended
    n_kept: int = 1000  # batches that are remembered


class BatchStore:
    """The only owner of the folder. All methods block and are called on one thread.

    A tenant's files and batches are missing for every other.
    """

    def __init__(self, folder: Path, limits: BatchLimits) -> None:
        self.limits = limits
        self._folder = folder
        self._tables = BatchTables(folder)

    def path(self, file_id: str) -> Path:
        return self._folder / "files" / file_id

    def recover(self) -> list[str]:
        """Once, at the start: removes what a crash left; tenants with batches to go on with."""
        if not self._folder.is_dir():
            return []
        with self._tables.transaction() as db:
            known = {row["id"] for row in db.execute("SELECT id FROM file")}
            for left in (self._folder / "files").iterdir():
                if left.name not in known:
                    left.unlink()
            active = "SELECT DISTINCT tenant FROM batch WHERE NOT has_ended"
            return [row["tenant"] for row in db.execute(active)]

    def add_file(
        self, tenant: str, staged: Path, filename: str, summary: InputSummary
    ) -> FileRecord:
        """Takes ``staged`` over. Raises ApiError (403) if the tenant has too much already."""
        n_bytes = staged.stat().st_size
        with self._tables.transaction() as db:
            found = db.execute(
                "SELECT count(*) AS n, coalesce(sum(n_bytes), 0) AS n_bytes FROM file "
                "WHERE tenant = ?",
                (tenant,),
            ).fetchone()
            if found["n"] >= self.limits.max_files:
                raise _quota(f"has {found['n']} files, {self.limits.max_files} are allowed")
            if found["n_bytes"] + n_bytes > self.limits.max_bytes:
                raise _quota(
                    f"has {found['n_bytes']} bytes of files, this one has {n_bytes}, and "
                    f"{self.limits.max_bytes} are allowed together"
                )
            record = _new_file("batch", filename, n_bytes, summary)
            _flush(staged)
            staged.rename(self.path(record.id))
            _flush(self._folder / "files")
            insert_file(db, tenant, record)
        return record

    def files(
        self, tenant: str, *, limit: int, after: str | None, purpose: str | None, oldest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """A page, and whether there are more. Raises ApiError (400) for an unknown ``after``."""
        with self._tables.transaction() as db:
            rows = page(
                db, "file", tenant, limit, after, oldest_first=oldest_first, purpose=purpose
            )
        return [file_of(row) for row in rows[:limit]], len(rows) > limit

    def file(self, tenant: str, file_id: str, *, param: str = "file_id") -> FileRecord:
        """Raises ApiError (404)."""
        with self._tables.transaction() as db:
            return file_of(row_by_id(db, "file", tenant, file_id, param))

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises ApiError: 404, or 409 while a batch needs it."""
        with self._tables.transaction() as db:
            row_by_id(db, "file", tenant, file_id, "file_id")
            user = db.execute(
                "SELECT id FROM batch WHERE input_file_id = ? AND NOT has_ended",
                (file_id,),
            ).fetchone()
            if user is not None:
                raise ApiError(
                    409,
                    f"the batch {user['id']} reads this file; cancel it first, or wait",
                    code="file_in_use",
                    param="file_id",
                )
            db.execute("DELETE FROM file WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    def add_batch(
        self,
        caller: BatchCaller,
        input_file_id: str,
        endpoint: str,
        metadata: Mapping[str, str] | None,
    ) -> BatchRecord:
        """Raises ApiError: 400, 404, or 429 if as many of the tenant's have not ended as may."""
        now = int(time.time())
        with self._tables.transaction() as db:
            file = file_of(row_by_id(db, "file", caller.tenant, input_file_id, "input_file_id"))
            if file.purpose != "batch":
                raise invalid(
                    f"{input_file_id!r} holds answers; upload a file of calls with purpose=batch",
                    "input_file_id",
                )
            if file.endpoints != (endpoint,):
                raise invalid(
                    f"the lines of {input_file_id!r} have the url {', '.join(file.endpoints)}, the "
                    f"endpoint is {endpoint!r}; all must be the same",
                    "endpoint",
                )
            active = db.execute(
                "SELECT count(*) AS n FROM batch WHERE tenant = ? AND NOT has_ended",
                (caller.tenant,),
            ).fetchone()
            if active["n"] >= self.limits.max_active:
                raise ApiError(
                    429,
                    f"this tenant may have {self.limits.max_active} batches that have not ended, "
                    "and has; wait for one, or cancel it",
                    code="quota_exceeded",
                    headers={"retry-after": "60"},
                )
            batch_id = f"batch_{uuid.uuid4().hex}"
            db.execute(
                "INSERT INTO batch (id, tenant, key_id, input_file_id, endpoint, metadata, status, "
                "times, created, expires, n_lines, n_completed, n_failed) "
                "VALUES (?, ?, ?, ?, ?, ?, 'validating', '{}', ?, ?, ?, 0, 0)",
                (
                    *(batch_id, caller.tenant, caller.key_id, input_file_id, endpoint),
                    *(json_text(metadata), now, now + _WINDOW_S, file.n_lines),
                ),
            )
            db.execute(
                "DELETE FROM batch WHERE tenant = :tenant AND has_ended AND number <= "
                "(SELECT number FROM batch WHERE tenant = :tenant "
                "ORDER BY number DESC LIMIT 1 OFFSET :n)",
                {"tenant": caller.tenant, "n": self.limits.n_kept},
            )
            return batch_of(row_by_id(db, "batch", caller.tenant, batch_id, "batch_id"))

    def batches(
        self, tenant: str, *, limit: int, after: str | None
    ) -> tuple[list[BatchRecord], bool]:
        """The newest first; a page, and whether there are more. Raises ApiError (400)."""
        with self._tables.transaction() as db:
            rows = page(db, "batch", tenant, limit, after)
        return [batch_of(row) for row in rows[:limit]], len(rows) > limit

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises ApiError (404)."""
        with self._tables.transaction() as db:
            return batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))

    def oldest_active(self, tenant: str) -> BatchRecord | None:
        with self._tables.transaction() as db:
            row = db.execute(
                "SELECT * FROM batch WHERE tenant = ? AND NOT has_ended ORDER BY number LIMIT 1",
                (tenant,),
            ).fetchone()
        return None if row is None else batch_of(row)

    def begin(self, tenant: str, batch_id: str) -> BatchRecord:
        """As it is then: one that was cancelled since it was looked up stays so."""
        with self._tables.transaction() as db:
            batch = batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))
            if batch.status is BatchStatus.VALIDATING:
                advance(db, batch_id, BatchStatus.IN_PROGRESS)
            return batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))

    def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises ApiError: 404, or 409 for one that has ended."""
        with self._tables.transaction() as db:
            batch = batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))
            if batch.status.has_ended:
                raise ApiError(
                    409,
                    f"the batch is {batch.status.value} and cannot be cancelled any more",
                    code="batch_ended",
                    param="batch_id",
                )
            if batch.status is not BatchStatus.CANCELLING:
                advance(db, batch_id, BatchStatus.CANCELLING)
            return batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))

    def answered(self, batch_id: str) -> set[int]:
        """Numbers of the lines that need no answer any more."""
        with self._tables.transaction() as db:
            rows = db.execute("SELECT line FROM answer WHERE batch_id = ?", (batch_id,))
            return {row["line"] for row in rows}

    def add_answer(self, batch_id: str, line: int, record: bytes, *, is_failure: bool) -> None:
        """On the disk when it returns."""
        counts = {"id": batch_id, "failed": int(is_failure), "completed": int(not is_failure)}
        with self._tables.transaction() as db:
            db.execute(
                "INSERT INTO answer VALUES (?, ?, ?, ?)", (batch_id, line, is_failure, record)
            )
            db.execute(
                "UPDATE batch SET n_failed = n_failed + :failed, "
                "n_completed = n_completed + :completed WHERE id = :id",
                counts,
            )

    def finish(self, tenant: str, batch_id: str) -> BatchRecord:
        """Writes the files of answers and ends the batch; does nothing if it has ended."""
        batch = self.batch(tenant, batch_id)
        if batch.status.has_ended:
            return batch
        n_answered = batch.n_completed + batch.n_failed
        end = BatchStatus.COMPLETED
        if batch.status is BatchStatus.CANCELLING:
            end = BatchStatus.CANCELLED
        elif n_answered < batch.n_lines:
            end = BatchStatus.EXPIRED
        else:
            with self._tables.transaction() as db:
                advance(db, batch_id, BatchStatus.FINALIZING)
        with self._tables.transaction() as db:
            if end is BatchStatus.EXPIRED:
                self._fail_the_rest(db, batch)
            output = self._write_answers(db, batch_id, "output", is_failure=False)
            failures = self._write_answers(db, batch_id, "error", is_failure=True)
            _flush(self._folder / "files")
            for file in (output, failures):
                if file is not None:
                    insert_file(db, tenant, file)
            db.execute(
                "UPDATE batch SET output_file_id = ?, error_file_id = ? WHERE id = ?",
                (output and output.id, failures and failures.id, batch_id),
            )
            db.execute("DELETE FROM answer WHERE batch_id = ?", (batch_id,))
            advance(db, batch_id, end)
        return self.batch(tenant, batch_id)

    def fail(self, batch_id: str, problem: str) -> None:
        with self._tables.transaction() as db:
            db.execute("DELETE FROM answer WHERE batch_id = ?", (batch_id,))
            db.execute("UPDATE batch SET problem = ? WHERE id = ?", (problem, batch_id))
            advance(db, batch_id, BatchStatus.FAILED)

    def _fail_the_rest(self, db: sqlite3.Connection, batch: BatchRecord) -> None:
        error = {"code": "batch_expired", "message": "the batch expired before this line ran"}
        with self.path(batch.input_file_id).open("rb") as file:
            for line in read_lines(file):
                added = db.execute(
                    "INSERT OR IGNORE INTO answer VALUES (?, ?, 1, ?)",
                    (batch.id, line.number, answer_record(line, None, error)),
                )
                db.execute(
                    "UPDATE batch SET n_failed = n_failed + ? WHERE id = ?",
                    (added.rowcount, batch.id),
                )

    def _write_answers(
        self, db: sqlite3.Connection, batch_id: str, name: str, *, is_failure: bool
    ) -> FileRecord | None:
        """In the order of the lines; None if there are none."""
        rows = db.execute(
            "SELECT record FROM answer WHERE batch_id = ? AND is_failure = ? ORDER BY line",
            (batch_id, is_failure),
        )
        file_id, n_lines = f"file-{uuid.uuid4().hex}", 0
        path = self.path(file_id)
        with path.open("wb") as file:
            for row in rows:
                file.write(row["record"] + b"\n")
                n_lines += 1
        if not n_lines:
            path.unlink()
            return None
        _flush(path)
        summary = InputSummary(n_lines, ())
        filename = f"{batch_id}_{name}.jsonl"
        return _new_file("batch_output", filename, path.stat().st_size, summary, file_id)


def answer_record(
    line: InputLine, response: Mapping[str, object] | None, error: Mapping[str, object] | None
) -> bytes:
    """A line of the output or of the error file."""
    record = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(record)


def _new_file(
    purpose: str, filename: str, n_bytes: int, summary: InputSummary, file_id: str | None = None
) -> FileRecord:
    return FileRecord(
        file_id or f"file-{uuid.uuid4().hex}",
        purpose,
        filename,
        n_bytes,
        int(time.time()),
        summary.n_lines,
        summary.endpoints,
    )


def _flush(path: Path) -> None:
    """To the disk: a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _quota(problem: str) -> ApiError:
    return ApiError(
        403, f"this tenant {problem}; delete files first", code="quota_exceeded", param="file"
    )
