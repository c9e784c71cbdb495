"""Stores files, batches and the answers of their lines in SQLite and a folder of files.

    upload ──▶ files/ID ──▶ row            an answer ──▶ row of (batch, line), once
    last answer ──▶ files/OUTPUT, files/ERRORS ──▶ rows, end of the batch (one transaction)
    ended batch ──▶ no answers

A crash can leave a file without a row, and answers of an ended batch. The next start removes them.
"""

import os
import sqlite3
import time
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from loraplex_server.api.request_info import BatchCaller
from loraplex_server.errors import ApiError, invalid

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
from .input_file import InputLine, read_lines
from .records import BatchRecord, BatchStatus, FileRecord, InputSummary

_WINDOW_S = 24 * 3600
_PIECE_BYTES = 2 << 20  # of answers, between two calls of other tenants
_PIECE_LINES = 500
_ANSWERS_AFTER = (
    "SELECT line, record FROM answer WHERE batch_id = ? AND is_failure = ? AND line > ? "
    "ORDER BY line"
)
_OLD_ANSWERS = (  # CROSS JOIN keeps SQLite from a scan of all answers
    "SELECT answer.rowid AS row_id, length(record) AS n_bytes FROM batch "
    "CROSS JOIN answer ON answer.batch_id = batch.id WHERE tenant = ? AND has_ended LIMIT ?"
)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The limits of each tenant."""

    max_files: int = 1000
    max_bytes: int = 4 << 30  # of all files, without the answers of running batches
    max_lines: int = 50_000  # in one file
    max_active: int = 16  # batches that have not ended
    n_kept: int = 1000  # batches; older ones that have ended are deleted

    def check_bytes(self, n: int) -> None:
        """Raises ApiError (403) if a tenant may not have files of ``n`` bytes."""
        if n > self.max_bytes:
            raise _quota(f"would have {n:,} bytes of files, {self.max_bytes:,} are allowed")


class BatchStore:
    """The only owner of the folder. All methods block and are called on one thread.

    Each tenant sees only its own files and batches. No call takes long: all tenants share the
    thread.
    """

    def __init__(self, folder: Path, limits: BatchLimits) -> None:
        self.limits = limits
        self._folder = folder
        self.tables = BatchTables(folder)

    def path(self, file_id: str) -> Path:
        return self._folder / "files" / file_id

    def recover(self) -> list[str]:
        """Remove files that a crash left. Return the tenants with unfinished work."""
        if not self._folder.is_dir():
            return []
        with self.tables.transaction() as db:
            known = {row["id"] for row in db.execute("SELECT id FROM file")}
            for path in (self._folder / "files").iterdir():
                if path.name not in known:
                    path.unlink()
            tenants = db.execute(
                "SELECT DISTINCT tenant FROM batch "
                "WHERE NOT has_ended OR id IN (SELECT batch_id FROM answer)"
            )
            return [row["tenant"] for row in tenants]

    def add_file(
        self, tenant: str, staged: Path, filename: str, purpose: str, summary: InputSummary
    ) -> FileRecord:
        """Move ``staged``, which `FileChecks` has flushed, into the store.

        Raises ApiError (403) for a tenant at its limit.
        """
        n_bytes = staged.stat().st_size
        with self.tables.transaction() as db:
            n_files, n_stored = _usage(db, tenant)
            if n_files >= self.limits.max_files:
                raise _quota(f"has {n_files} files, {self.limits.max_files} are allowed")
            self.limits.check_bytes(n_stored + n_bytes)
            record = _new_file(purpose, filename, n_bytes, summary)
            staged.rename(self.path(record.id))
            _flush(self._folder / "files")
            insert_file(db, tenant, record)
        return record

    def write_results(self, filename: str, content: bytes) -> FileRecord:
        """Write a file of a fine-tuning job durably. The caller inserts its row."""
        summary = InputSummary(content.count(b"\n"), ())
        record = _new_file("fine-tune-results", filename, len(content), summary)
        self.path(record.id).write_bytes(content)
        for path in (self.path(record.id), self._folder / "files"):
            _flush(path)
        return record

    def n_bytes(self, tenant: str) -> int:
        """Return the bytes of the tenant's files."""
        with self.tables.transaction() as db:
            return _usage(db, tenant).n_bytes

    def files(
        self, tenant: str, *, limit: int, after: str | None, purpose: str | None, oldest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """Return a page, and True if more files follow. Raises ApiError (400) for ``after``."""
        with self.tables.transaction() as db:
            rows = page(
                db, "file", tenant, limit, after, oldest_first=oldest_first, purpose=purpose
            )
        return [file_of(row) for row in rows[:limit]], len(rows) > limit

    def file(self, tenant: str, file_id: str, *, param: str = "file_id") -> FileRecord:
        """Return the record of a file. Raises ApiError (404)."""
        with self.tables.transaction() as db:
            return file_of(row_by_id(db, "file", tenant, file_id, param))

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Delete a file. Raises ApiError: 404, or 409 while a batch or a job needs the file."""
        with self.tables.transaction() as db:
            row_by_id(db, "file", tenant, file_id, "file_id")
            user = db.execute(
                "SELECT id FROM batch WHERE input_file_id = :file AND NOT has_ended UNION "
                "SELECT id FROM fine_tuning_job "
                "WHERE :file IN (training_file, validation_file) AND NOT has_ended",
                {"file": file_id},
            ).fetchone()
            if user is not None:
                raise ApiError(
                    409,
                    f"{user['id']} reads this file; cancel it first, or wait",
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
        """Raises ApiError: 400, 404, or 429 if the tenant has too many unfinished batches."""
        now = int(time.time())
        with self.tables.transaction() as db:
            file = file_of(row_by_id(db, "file", caller.tenant, input_file_id, "input_file_id"))
            if file.purpose != "batch":
                raise invalid(
                    f"{input_file_id!r} has the purpose {file.purpose}; upload a file of calls "
                    "with purpose=batch",
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
                    f"this tenant has {self.limits.max_active} unfinished batches, the limit; "
                    "wait for the end of one, or cancel it",
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
        """Return a page, newest first, and True if more batches follow. Raises ApiError (400)."""
        with self.tables.transaction() as db:
            rows = page(db, "batch", tenant, limit, after)
        return [batch_of(row) for row in rows[:limit]], len(rows) > limit

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """Return the record of a batch. Raises ApiError (404)."""
        with self.tables.transaction() as db:
            return batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))

    def oldest_active(self, tenant: str) -> BatchRecord | None:
        with self.tables.transaction() as db:
            row = db.execute(
                "SELECT * FROM batch WHERE tenant = ? AND NOT has_ended ORDER BY number LIMIT 1",
                (tenant,),
            ).fetchone()
        return None if row is None else batch_of(row)

    def begin(self, tenant: str, batch_id: str) -> BatchRecord:
        """Start the batch, unless it was cancelled meanwhile. Return its record."""
        with self.tables.transaction() as db:
            batch = batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))
            if batch.status is BatchStatus.VALIDATING:
                advance(db, batch_id, BatchStatus.IN_PROGRESS)
            return batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))

    def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises ApiError: 404, or 409 for a batch that has ended."""
        with self.tables.transaction() as db:
            batch = batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))
            if batch.status.has_ended:
                raise ApiError(
                    409,
                    f"the batch is {batch.status.value} and cannot be cancelled",
                    code="batch_ended",
                    param="batch_id",
                )
            if batch.status is not BatchStatus.CANCELLING:
                advance(db, batch_id, BatchStatus.CANCELLING)
            return batch_of(row_by_id(db, "batch", tenant, batch_id, "batch_id"))

    def answered(self, batch_id: str) -> set[int]:
        """Return the numbers of the lines that have an answer."""
        with self.tables.transaction() as db:
            rows = db.execute("SELECT line FROM answer WHERE batch_id = ?", (batch_id,))
            return {row["line"] for row in rows}

    def add_answer(self, batch_id: str, line: int, record: bytes, *, is_failure: bool) -> None:
        """Write the answer of a line durably."""
        counts = {"id": batch_id, "failed": int(is_failure), "completed": int(not is_failure)}
        with self.tables.transaction() as db:
            db.execute(
                "INSERT INTO answer VALUES (?, ?, ?, ?)", (batch_id, line, is_failure, record)
            )
            db.execute(
                "UPDATE batch SET n_failed = n_failed + :failed, "
                "n_completed = n_completed + :completed WHERE id = :id",
                counts,
            )

    def finish(self, tenant: str, batch_id: str) -> Iterator[bool]:
        """Write the files of answers and end the batch. Does nothing for an ended batch.

        Yields True after each piece of the work, so that calls of others can run between pieces.
        """
        batch = self.batch(tenant, batch_id)
        if batch.status.has_ended:
            return
        n_answered = batch.n_completed + batch.n_failed
        end = BatchStatus.COMPLETED
        if batch.status is BatchStatus.CANCELLING:
            end = BatchStatus.CANCELLED
        elif n_answered < batch.n_lines:
            end = BatchStatus.EXPIRED
            yield from self._fail_the_rest(batch)
        else:
            with self.tables.transaction() as db:
                advance(db, batch_id, BatchStatus.FINALIZING)
        output = yield from self._write_answers(batch_id, "output", is_failure=False)
        failures = yield from self._write_answers(batch_id, "error", is_failure=True)
        with self.tables.transaction() as db:
            _flush(self._folder / "files")
            for file in (output, failures):
                if file is not None:
                    insert_file(db, tenant, file)
            db.execute(
                "UPDATE batch SET output_file_id = ?, error_file_id = ? WHERE id = ?",
                (output and output.id, failures and failures.id, batch_id),
            )
            advance(db, batch_id, end)

    def fail(self, batch_id: str, problem: str) -> None:
        with self.tables.transaction() as db:
            db.execute("UPDATE batch SET problem = ? WHERE id = ?", (problem, batch_id))
            advance(db, batch_id, BatchStatus.FAILED)

    def delete_old_answers(self, tenant: str) -> Iterator[bool]:
        """Delete the answers of ended batches, which have files. Yields like ``finish``."""
        while True:
            with self.tables.transaction() as db:
                rows = db.execute(_OLD_ANSWERS, (tenant, _PIECE_LINES)).fetchall()
                n_bytes = 0
                for row in rows:
                    db.execute("DELETE FROM answer WHERE rowid = ?", (row["row_id"],))
                    n_bytes += row["n_bytes"]
                    if n_bytes >= _PIECE_BYTES:
                        break
            if not rows:
                return
            yield True

    def _fail_the_rest(self, batch: BatchRecord) -> Iterator[bool]:
        error = {"code": "batch_expired", "message": "the batch expired before this line ran"}
        answered = self.answered(batch.id)
        with self.path(batch.input_file_id).open("rb") as file:
            for piece in _in_pieces(read_lines(file, without=answered)):
                rows = [(batch.id, each.number, answer_record(each, None, error)) for each in piece]
                with self.tables.transaction() as db:
                    db.executemany("INSERT INTO answer VALUES (?, ?, 1, ?)", rows)
                    db.execute(
                        "UPDATE batch SET n_failed = n_failed + ? WHERE id = ?",
                        (len(piece), batch.id),
                    )
                yield True

    def _write_answers(
        self, batch_id: str, name: str, *, is_failure: bool
    ) -> Generator[bool, None, FileRecord | None]:
        """Write the answers in the order of the lines. Return None if there are none."""
        file_id, n_lines, last, is_whole = f"file-{uuid.uuid4().hex}", 0, 0, False
        path = self.path(file_id)
        with path.open("wb") as file:
            while not is_whole:
                end = file.tell() + _PIECE_BYTES
                with self.tables.transaction() as db:
                    for row in db.execute(_ANSWERS_AFTER, (batch_id, is_failure, last)):
                        file.write(row["record"] + b"\n")
                        n_lines, last = n_lines + 1, row["line"]
                        if file.tell() >= end:
                            break
                    else:
                        is_whole = True
                file.flush()
                os.fsync(file.fileno())
                yield True
        if not n_lines:
            path.unlink()
            return None
        summary = InputSummary(n_lines, ())
        filename = f"{batch_id}_{name}.jsonl"
        return _new_file("batch_output", filename, path.stat().st_size, summary, file_id)


def answer_record(
    line: InputLine, response: Mapping[str, object] | None, error: Mapping[str, object] | None
) -> bytes:
    """Return a line of the output file or the error file."""
    record = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(record)


def _in_pieces(lines: Iterator[InputLine]) -> Iterator[list[InputLine]]:
    """Group lines so that a piece takes milliseconds."""
    piece: list[InputLine] = []
    n_bytes = 0
    for line in lines:
        piece.append(line)
        n_bytes += len(line.body)
        if n_bytes >= _PIECE_BYTES or len(piece) == _PIECE_LINES:
            yield piece
            piece, n_bytes = [], 0
    if piece:
        yield piece


class _Usage(NamedTuple):
    n_files: int
    n_bytes: int


def _usage(db: sqlite3.Connection, tenant: str) -> _Usage:
    usage = "SELECT count(*), coalesce(sum(n_bytes), 0) FROM file WHERE tenant = ?"
    return _Usage(*db.execute(usage, (tenant,)).fetchone())


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
    """Flush a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _quota(problem: str) -> ApiError:
    return ApiError(
        403, f"this tenant {problem}; delete files first", code="quota_exceeded", param="file"
    )
