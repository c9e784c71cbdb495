"""The catalogue: names, their revisions and the contents they point at, in SQLite.

Write-ahead log with full synchronisation: what a method has returned from survives a power cut.
Names move by compare-and-set inside one transaction. Revision numbers of a name are never reused.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import RevisionConflict, StoreError, UnknownAdapter
from .plan import Family
from .report import JsonValue, LoadReport

__all__ = ["Content", "NameRecord", "Registry"]

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
)


@dataclass(frozen=True, slots=True)
class Content:
    digest: str
    family: Family
    ranks: tuple[int, ...]
    disk_bytes: int
    host_bytes: int
    base_fingerprint: str
    plan_sha256: str  # of the packed plan's file


@dataclass(frozen=True, slots=True)
class NameRecord:
    """What a name points at now."""

    name: str
    revision: int
    digest: str
    description: str | None
    examples: tuple[str, ...]
    provenance: Mapping[str, JsonValue]
    created: float
    pinned: bool


class Registry:
    """Thread-safe; one connection, one writer."""

    def __init__(self, path: Path) -> None:
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
        with self._lock:
            rows = self._db.execute(_SELECT_NAMES + " ORDER BY n.name").fetchall()
        return tuple(_record(row) for row in rows)

    def contents(self) -> tuple[Content, ...]:
        with self._lock:
            rows = self._db.execute(
                "SELECT digest, family, ranks, disk_bytes, host_bytes, base_fingerprint,"
                " plan_sha256 FROM contents"
            ).fetchall()
        return tuple(_content(row) for row in rows)

    def report(self, digest: str) -> LoadReport:
        with self._lock:
            row = self._db.execute(
                "SELECT report FROM contents WHERE digest = ?", (digest,)
            ).fetchone()
        if row is None:
            raise UnknownAdapter(digest)
        return LoadReport.from_json(json.loads(row[0]))

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of every content the name ever had, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT revision, digest, created FROM revisions WHERE name = ? ORDER BY revision",
                (name,),
            ).fetchall()
        return tuple((int(row[0]), str(row[1]), float(row[2])) for row in rows)

    def put(
        self,
        name: str,
        content: Content,
        report: LoadReport,
        *,
        if_match: str | None,
        replace: bool,
        description: str | None,
        examples: tuple[str, ...],
        provenance: Mapping[str, JsonValue],
        created: float,
    ) -> NameRecord:
        """Points ``name`` at ``content``. Raises RevisionConflict and changes nothing."""
        with self._transaction() as db:
            current = db.execute(
                "SELECT r.digest FROM names n JOIN revisions r USING (name, revision)"
                " WHERE n.name = ?",
                (name,),
            ).fetchone()
            _check_match(name, None if current is None else str(current[0]), if_match, replace)
            db.execute(
                "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    content.digest,
                    content.family.value,
                    json.dumps(content.ranks),
                    content.disk_bytes,
                    content.host_bytes,
                    content.base_fingerprint,
                    content.plan_sha256,
                    json.dumps(report.to_json()),
                ),
            )
            last = db.execute(
                "SELECT COALESCE(MAX(revision), 0) FROM revisions WHERE name = ?", (name,)
            ).fetchone()
            revision = int(last[0]) + 1
            db.execute(
                "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    name,
                    revision,
                    content.digest,
                    description,
                    json.dumps(examples),
                    json.dumps(dict(provenance)),
                    created,
                ),
            )
            db.execute(
                "INSERT INTO names (name, revision) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET revision = excluded.revision",
                (name, revision),
            )
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
        return _record(row)

    def remove_name(self, name: str, if_match: str | None = None) -> None:
        with self._transaction() as db:
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
            if row is None:
                raise UnknownAdapter(name)
            _check_match(name, _record(row).digest, if_match, replace=True)
            db.execute("DELETE FROM names WHERE name = ?", (name,))

    def set_pinned(self, name: str, *, pinned: bool) -> NameRecord:
        with self._transaction() as db:
            db.execute("UPDATE names SET pinned = ? WHERE name = ?", (int(pinned), name))
            row = db.execute(_SELECT_NAMES + " WHERE n.name = ?", (name,)).fetchone()
        if row is None:
            raise UnknownAdapter(name)
        return _record(row)

    def forget_content(self, digest: str) -> None:
        """The files are gone; the revision history keeps the digest."""
        with self._transaction() as db:
            db.execute("DELETE FROM contents WHERE digest = ?", (digest,))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _migrate(self) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(_MIGRATIONS):
            raise StoreError(
                f"the catalogue has schema {version}, this version of loraplex knows "
                f"{len(_MIGRATIONS)}: use the newer one"
            )
        for number in range(version, len(_MIGRATIONS)):
            self._db.executescript(
                f"BEGIN; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


_SELECT_NAMES = (
    "SELECT n.name, r.revision, r.digest, r.description, r.examples, r.provenance, r.created,"
    " n.pinned FROM names n JOIN revisions r ON r.name = n.name AND r.revision = n.revision"
)


def _check_match(name: str, current: str | None, if_match: str | None, replace: bool) -> None:
    if if_match is not None and current != if_match:
        now = "does not exist" if current is None else f"has digest {current}"
        raise RevisionConflict(f"adapter {name!r} {now}, not {if_match}", current)
    if not replace and current is not None:
        raise RevisionConflict(f"adapter {name!r} exists already (digest {current})", current)


def _record(row: tuple[object, ...]) -> NameRecord:
    name, revision, digest, description, examples, provenance, created, pinned = row
    assert isinstance(revision, int)
    assert isinstance(created, float)
    return NameRecord(
        name=str(name),
        revision=revision,
        digest=str(digest),
        description=None if description is None else str(description),
        examples=tuple(json.loads(str(examples))),
        provenance=json.loads(str(provenance)),
        created=created,
        pinned=bool(pinned),
    )


def _content(row: tuple[object, ...]) -> Content:
    digest, family, ranks, disk_bytes, host_bytes, fingerprint, plan_sha256 = row
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
    )
