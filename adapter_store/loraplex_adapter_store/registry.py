"""The registry: names, their revisions and the contents they point at, in SQLite.

Write-ahead log with full synchronisation: what a method has returned from survives a power cut.
Names move by compare-and-set inside one transaction. Revision numbers of a name are never reused.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .card import CardEdit
from .errors import StoreError, UnknownAdapter
from .faults import FaultLog, NoFaultLog
from .name_record import Content, NameRecord, Put, check_expired, check_match, check_unchanged
from .plan import Family, HeadTask
from .put_options import PutOptions
from .report import LoadReport

__all__ = ["Registry"]

_MIGRATIONS = (
    """
    CREATE TABLE contents (
        digest TEXT PRIMARY KEY, family TEXT NOT NULL, ranks TEXT NOT NULL,
        disk_bytes INTEGER NOT NULL, host_bytes INTEGER NOT NULL,
        base_fingerprint TEXT NOT NULL, plan_sha256 TEXT NOT NULL, report TEXT NOT NULL
    ) STRICT;
    CREATE TABLE revisions (
        name TEXT NOT NULL, revision INTEGER NOT NULL, digest TEXT NOT NULL,
        description TEXT, examples TEXT NOT NULL, provenance TEXT NOT NULL, created REAL NOT NULL,
        PRIMARY KEY (name, revision)
    ) STRICT;
    CREATE TABLE names (
        name TEXT PRIMARY KEY, revision INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
    "CREATE INDEX revisions_by_digest ON revisions (digest);",
    """
    ALTER TABLE names ADD COLUMN expires REAL;
    ALTER TABLE revisions ADD COLUMN kept INTEGER NOT NULL DEFAULT 0;
    """,
    "ALTER TABLE contents ADD COLUMN task TEXT;",
    """
    ALTER TABLE revisions ADD COLUMN defaults TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE revisions ADD COLUMN edits INTEGER NOT NULL DEFAULT 0;
    """,
)


class Registry:
    """Thread-safe; one connection, one writer."""

    def __init__(self, path: Path, faults: FaultLog = NoFaultLog()) -> None:  # noqa: B008
        self._faults = faults
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._migrate()
        except BaseException:
            self._db.close()
            raise

    def names(self) -> tuple[NameRecord, ...]:
        with self._connection() as db:
            rows = db.execute(_SELECT_NAMES + " ORDER BY n.name").fetchall()
        return tuple(_record(row) for row in rows)

    def kept(self) -> tuple[NameRecord, ...]:
        """Older revisions whose contents are kept, newest first."""
        with self._connection() as db:
            rows = db.execute(_SELECT_KEPT + " ORDER BY revision DESC").fetchall()
        return tuple(_record(row) for row in rows)

    def contents(self) -> tuple[Content, ...]:
        with self._connection() as db:
            rows = db.execute(
                "SELECT digest, family, ranks, disk_bytes, host_bytes, base_fingerprint,"
                " plan_sha256, task FROM contents"
            ).fetchall()
        return tuple(_content(row) for row in rows)

    def report(self, content: Content) -> LoadReport:
        with self._connection() as db:
            row = db.execute(
                "SELECT report FROM contents WHERE digest = ?", (content.digest,)
            ).fetchone()
        if row is None:
            raise UnknownAdapter(content.digest)
        return LoadReport.from_json(json.loads(row[0]))

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of every content the name ever had, oldest first."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT revision, digest, created FROM revisions WHERE name = ? ORDER BY revision",
                (name,),
            ).fetchall()
        return tuple((int(row[0]), str(row[1]), float(row[2])) for row in rows)

    def put(
        self,
        name: str,
        content: Content,
        report: LoadReport,
        options: PutOptions,
        *,
        n_kept: int,
    ) -> Put:
        """Points ``name`` at ``content``. Raises RevisionConflict and changes nothing.

        The revision it had becomes a kept one; of those the ``n_kept`` newest stay.
        """
        with self._transaction() as db:
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
            current = None if row is None else _record(row)
            check_match(name, current, options.if_match, options.replace)
            db.execute(
                "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    content.digest,
                    content.family.value,
                    json.dumps(content.ranks),
                    content.disk_bytes,
                    content.host_bytes,
                    content.base_fingerprint,
                    content.plan_sha256,
                    json.dumps(report.to_json()),
                    None if content.task is None else content.task.value,
                ),
            )
            last = db.execute(
                "SELECT COALESCE(MAX(revision), 0) FROM revisions WHERE name = ?", (name,)
            ).fetchone()
            revision = int(last[0]) + 1
            db.execute(
                "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, 0)",
                (
                    name,
                    revision,
                    content.digest,
                    options.description,
                    json.dumps(list(options.examples)),
                    json.dumps(dict(options.provenance or {})),
                    time.time(),
                    json.dumps(dict(options.defaults or {})),
                ),
            )
            db.execute(
                "INSERT INTO names (name, revision, expires) VALUES (?, ?, ?) ON CONFLICT (name)"
                " DO UPDATE SET revision = excluded.revision, expires = excluded.expires",
                (name, revision, options.expires),
            )
            if current is not None:
                _keep(db, current, content.digest, n_kept)
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
            kept = db.execute(
                _SELECT_KEPT + " AND name = ? ORDER BY revision DESC", (name,)
            ).fetchall()
        return Put(_record(row), tuple(_record(old) for old in kept), current)

    def remove_name(
        self, name: str, if_match: str | None = None, *, expired_by: float | None = None
    ) -> None:
        """``expired_by``: only if it expires by then. Raises UnknownAdapter or RevisionConflict."""
        with self._transaction() as db:
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
            if row is None:
                raise UnknownAdapter(name)
            record = _record(row)
            check_match(name, record, if_match, replace=True)
            check_expired(record, expired_by)
            db.execute("DELETE FROM names WHERE name = ?", (name,))
            db.execute("UPDATE revisions SET kept = 0 WHERE name = ? AND kept", (name,))

    def edit(self, name: str, edit: CardEdit, *, if_match: str | None) -> NameRecord:
        """A new card for the same content. Raises UnknownAdapter or RevisionConflict."""
        with self._transaction() as db:
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
            if row is None:
                raise UnknownAdapter(name)
            current = _record(row)
            check_unchanged(current, if_match)
            provenance = current.provenance if edit.provenance is None else edit.provenance
            db.execute(
                "UPDATE revisions SET description = ?, examples = ?, defaults = ?,"
                " provenance = ?, edits = edits + 1 WHERE name = ? AND revision = ?",
                (
                    edit.description,
                    json.dumps(list(edit.examples)),
                    json.dumps(dict(edit.defaults)),
                    json.dumps(dict(provenance)),
                    name,
                    current.revision,
                ),
            )
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
        return _record(row)

    def set_pinned(self, name: str, *, pinned: bool) -> NameRecord:
        return self._set(name, "UPDATE names SET pinned = ? WHERE name = ?", int(pinned))

    def set_expiry(self, name: str, expires: float | None) -> NameRecord:
        return self._set(name, "UPDATE names SET expires = ? WHERE name = ?", expires)

    def forget_content(self, digest: str) -> None:
        """The files are gone; the revision history keeps the digest."""
        with self._transaction() as db:
            db.execute("DELETE FROM contents WHERE digest = ?", (digest,))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _set(self, name: str, update: str, value: float | None) -> NameRecord:
        with self._transaction() as db:
            db.execute(update, (value, name))
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
        if row is None:
            raise UnknownAdapter(name)
        return _record(row)

    def _migrate(self) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(_MIGRATIONS):
            raise StoreError(
                f"the registry has schema {version}, this version of loraplex knows "
                f"{len(_MIGRATIONS)}: use the newer one"
            )
        for number in range(version, len(_MIGRATIONS)):
            self._db.executescript(
                f"BEGIN; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. Raises sqlite3.Error, and then nothing has changed."""
        with self._connection() as db:
            if db.in_transaction:  # the last one could not even be rolled back
                db.execute("ROLLBACK")
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite has done it itself after some errors
                    with suppress(sqlite3.Error):  # tried again before the next one
                        db.execute("ROLLBACK")
                raise
            self._faults.worked("catalogue")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """For one thread at a time. Failures are reported."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                self._faults.failed("catalogue", error)
                raise


_SELECT_NAMES = (
    "SELECT n.name, r.revision, r.digest, r.description, r.examples, r.provenance, r.created,"
    " n.pinned, n.expires, r.defaults, r.edits"
    " FROM names n JOIN revisions r ON r.name = n.name AND r.revision = n.revision"
)
_SELECT_KEPT = (
    "SELECT name, revision, digest, description, examples, provenance, created, 0, NULL,"
    " defaults, edits"
    " FROM revisions WHERE kept"
)


def _keep(db: sqlite3.Connection, old: NameRecord, new_digest: str, n_kept: int) -> None:
    """Each content is kept once, and the current one is not among the kept ones."""
    db.execute(
        "UPDATE revisions SET kept = 1 WHERE name = ? AND revision = ?", (old.name, old.revision)
    )
    db.execute(
        "UPDATE revisions SET kept = 0 WHERE name = ? AND kept AND digest = ?",
        (old.name, new_digest),
    )
    db.execute(
        "UPDATE revisions SET kept = 0 WHERE name = ? AND kept AND revision NOT IN (SELECT revision"
        " FROM revisions WHERE name = ? AND kept ORDER BY revision DESC LIMIT ?)",
        (old.name, old.name, n_kept),
    )


def _record(row: tuple[object, ...]) -> NameRecord:
    name, revision, digest, description, examples, provenance, created, pinned, expires = row[:9]
    defaults, edits = row[9:]
    assert isinstance(edits, int)
    assert isinstance(revision, int)
    assert isinstance(created, float)
    assert isinstance(expires, float | None)
    return NameRecord(
        name=str(name),
        revision=revision,
        digest=str(digest),
        description=None if description is None else str(description),
        examples=tuple(json.loads(str(examples))),
        provenance=json.loads(str(provenance)),
        created=created,
        pinned=bool(pinned),
        expires=expires,
        defaults=json.loads(str(defaults)),
        edits=edits,
    )


def _content(row: tuple[object, ...]) -> Content:
    digest, family, ranks, disk_bytes, host_bytes, fingerprint, plan_sha256, task = row
    assert isinstance(disk_bytes, int)
    assert isinstance(host_bytes, int)
    return Content(
        digest=str(digest),
        family=Family(family),
        ranks=tuple(json.loads(str(ranks))),
        disk_bytes=disk_bytes,
        host_bytes=host_bytes,
        base_fingerprint=str(fingerprint),
        plan_sha256=str(plan_sha256),
        task=None if task is None else HeadTask(task),
    )
