"""The SQLite tables of files, batches, answers and fine-tuning jobs: transactions and pages."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import orjson

from loraplex_server.api.request_info import BatchCaller
from loraplex_server.errors import ApiError, invalid, not_found

from .records import BatchRecord, BatchStatus, FileRecord

_SCHEMA = """
CREATE TABLE IF NOT EXISTS file (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, tenant TEXT, purpose TEXT,
    filename TEXT, n_bytes INTEGER, created INTEGER, n_lines INTEGER, endpoints TEXT
);
CREATE TABLE IF NOT EXISTS batch (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, tenant TEXT, key_id TEXT,
    input_file_id TEXT, endpoint TEXT, metadata TEXT, status TEXT, times TEXT, created INTEGER,
    expires INTEGER, n_lines INTEGER, n_completed INTEGER, n_failed INTEGER, output_file_id TEXT,
    error_file_id TEXT, problem TEXT,
    has_ended INTEGER AS (status IN ('completed', 'failed', 'expired', 'cancelled'))
);
CREATE TABLE IF NOT EXISTS answer (
    batch_id TEXT, line INTEGER, is_failure INTEGER, record BLOB, PRIMARY KEY (batch_id, line)
);
CREATE TABLE IF NOT EXISTS fine_tuning_job (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, tenant TEXT, key_id TEXT,
    training_file TEXT, validation_file TEXT, status TEXT, created INTEGER, n_bytes INTEGER,
    n_tokens INTEGER, details TEXT,
    has_ended INTEGER AS (status IN ('succeeded', 'failed', 'cancelled'))
);
CREATE TABLE IF NOT EXISTS fine_tuning_event (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, job_id TEXT, created INTEGER,
    level TEXT, message TEXT, step INTEGER, data TEXT
);
CREATE INDEX IF NOT EXISTS fine_tuning_event_of_job ON fine_tuning_event (job_id, step);
CREATE TABLE IF NOT EXISTS fine_tuning_checkpoint (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, job_id TEXT, created INTEGER,
    name TEXT, step INTEGER, metrics TEXT, UNIQUE (job_id, step)
);
"""
_BY_ID = {  # the second value is the owner: a tenant, or a job that the tenant owns
    "file": "SELECT * FROM file WHERE id = ? AND tenant = ?",
    "batch": "SELECT * FROM batch WHERE id = ? AND tenant = ?",
    "fine_tuning_job": "SELECT * FROM fine_tuning_job WHERE id = ? AND tenant = ?",
    "fine_tuning_event": "SELECT * FROM fine_tuning_event WHERE id = ? AND job_id = ?",
    "fine_tuning_checkpoint": "SELECT * FROM fine_tuning_checkpoint WHERE id = ? AND job_id = ?",
}
_AFTER = (
    "AND (:last IS NULL OR :sign * number > :sign * :last) ORDER BY :sign * number LIMIT :limit"
)
_PAGE = {  # before ``_AFTER``; ``sign``: 1 for the oldest first, -1 for the newest
    "file": "SELECT * FROM file WHERE tenant = :owner AND (:purpose IS NULL OR purpose = :purpose)",
    "batch": "SELECT * FROM batch WHERE tenant = :owner",
    "fine_tuning_job": "SELECT * FROM fine_tuning_job WHERE tenant = :owner "
    "AND NOT EXISTS (SELECT 1 FROM json_each(:metadata) AS entry "
    "WHERE details -> 'metadata' ->> entry.key IS NOT entry.value)",
    "fine_tuning_event": "SELECT * FROM fine_tuning_event WHERE job_id = :owner",
    "fine_tuning_checkpoint": "SELECT * FROM fine_tuning_checkpoint WHERE job_id = :owner",
}


class BatchTables:
    """Creates the tables with the first transaction. Methods block; called on one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_made = False

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit durably at the end, or roll back on an error."""
        if not self._is_made:
            (self._folder / "files").mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._folder / "batches.sqlite3")) as db:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA synchronous = FULL")
            if not self._is_made:
                db.executescript(_SCHEMA)
                self._is_made = True
            with db:
                yield db


def insert_file(db: sqlite3.Connection, tenant: str, file: FileRecord) -> None:
    db.execute(
        "INSERT INTO file (id, tenant, purpose, filename, n_bytes, created, n_lines, endpoints) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(file.id, tenant, file.purpose, file.filename, file.n_bytes, file.created),
            *(file.n_lines, json_text(list(file.endpoints))),
        ),
    )


def page(
    db: sqlite3.Connection,
    table: str,
    owner: str,
    limit: int,
    after: str | None,
    *,
    oldest_first: bool = False,
    purpose: str | None = None,
    metadata: str = "{}",
) -> list[sqlite3.Row]:
    """Return up to ``limit + 1`` rows of an owner, see ``_BY_ID``."""
    last = None
    if after is not None:
        try:
            last = row_by_id(db, table, owner, after, "after")["number"]
        except ApiError as error:
            raise invalid(error.message, "after") from None
    values = {
        "owner": owner,
        "purpose": purpose,
        "metadata": metadata,
        "last": last,
        "sign": 1 if oldest_first else -1,
        "limit": limit + 1,
    }
    return db.execute(" ".join((_PAGE[table], _AFTER)), values).fetchall()


def row_by_id(db: sqlite3.Connection, table: str, owner: str, id: str, param: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute(_BY_ID[table], (_storable(id), owner)).fetchone()
    if row is None:
        raise not_found(f"{table} {id[:64]!r} does not exist", param, f"{table}_not_found")
    return row


def advance(db: sqlite3.Connection, batch_id: str, status: BatchStatus) -> None:
    db.execute(
        "UPDATE batch SET status = :status, times = json_set(times, '$.' || :status, :now) "
        "WHERE id = :id",
        {"id": batch_id, "status": status.value, "now": int(time.time())},
    )


def file_of(row: sqlite3.Row) -> FileRecord:
    return FileRecord(
        row["id"],
        row["purpose"],
        row["filename"],
        row["n_bytes"],
        row["created"],
        row["n_lines"],
        tuple(orjson.loads(row["endpoints"])),
    )


def batch_of(row: sqlite3.Row) -> BatchRecord:
    return BatchRecord(
        id=row["id"],
        caller=BatchCaller(row["key_id"], row["tenant"]),
        input_file_id=row["input_file_id"],
        endpoint=row["endpoint"],
        metadata=orjson.loads(row["metadata"]),
        status=BatchStatus(row["status"]),
        times=orjson.loads(row["times"]),
        created=row["created"],
        expires=row["expires"],
        n_lines=row["n_lines"],
        n_completed=row["n_completed"],
        n_failed=row["n_failed"],
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        problem=row["problem"],
    )


def json_text(value: object) -> str:
    return orjson.dumps(value).decode()


def _storable(text: str) -> str:
    """Replace lone surrogates, which SQLite refuses."""
    return text.encode(errors="replace").decode()
