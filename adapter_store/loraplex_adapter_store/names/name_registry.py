"""Registries, where a store keeps its names: the contract, and a file that one store owns.

SQLite's write-ahead log with full synchronisation: a change survives a power cut once a method
returns.
"""

import json
import logging
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import ClassVar

from loraplex_adapter_store.errors import StoredAdapterDamaged, StoreError, UnknownAdapter
from loraplex_adapter_store.part_log import worked
from loraplex_adapter_store.report import LoadReport

from .name_record import Content
from .name_state import Change, NameState, Transition

Apply = Callable[[NameState], None]  # brings the store's memory to this state of a name
REGISTRY_FILE = "registry.sqlite3"
SCHEMA = 6
_REMEDY = "`loraplex adapters verify` says what is wrong, and repairs what it can"
_log = logging.getLogger(__name__)


class NameRegistry(ABC):
    """Owner of the states of all names. Thread-safe; calls block.

    Other servers may change names too, so a store follows a name before it uses it. Those methods
    do nothing in a registry that belongs to one server.
    """

    is_shared: ClassVar[bool] = False  # True: calls wait for the network

    @abstractmethod
    def start(self, apply: Apply) -> bool:
        """Apply all names, and from now on changes by others. Return False if names are missing."""

    @abstractmethod
    def change(
        self, name: str, transition: Transition, report: LoadReport | None = None
    ) -> AbstractContextManager[Change]:
        """Change a name by compare-and-set. The caller applies the result inside the block.

        ``report``: of the content that the name gets. Raises what ``transition`` raises, and then
        nothing has changed.
        """

    @abstractmethod
    def report(self, content: Content) -> LoadReport:
        """Raises UnknownAdapter or StoredAdapterDamaged if the report is gone."""

    @abstractmethod
    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """Return (revision, digest, created) of the name's last contents, oldest first."""

    @abstractmethod
    def forget_content(self, digest: str) -> None:
        """Delete the report of a content that this store has deleted."""

    @abstractmethod
    def close(self) -> None: ...

    def usable(self, content: Content, state: NameState) -> Content:
        """Return ``content`` as the name in ``state`` may refer to it. Raises StoreError."""
        return content

    def is_fresh(self, name: str) -> bool:
        """True if the store's copy of the name is up to date. Takes a microsecond."""
        return True

    def follow(self, name: str) -> None:  # noqa: B027  a default
        """Bring the store up to date with ``name`` before a use, unless it is fresh.

        Raises CatalogueUnavailable.
        """

    def follow_all(self) -> None:  # noqa: B027
        """``follow`` for all names."""

    def refresh(self, name: str) -> None:  # noqa: B027
        """Bring the store up to date before a change. Raises CatalogueUnavailable."""

    def refresh_tenant(self, tenant: str) -> None:  # noqa: B027
        """``refresh`` all names of a tenant, before its quota is checked."""

    def changing(self, name: str) -> AbstractContextManager[None]:
        """Block changes of ``name`` by other servers inside the block."""
        return nullcontext()


class SqliteRegistry(NameRegistry):
    """A registry with one connection and one writer."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError."""
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._prepare_tables()
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise StoreError(f"{path} cannot be opened ({error}); {_REMEDY}") from error
            raise

    def start(self, apply: Apply) -> bool:
        """Apply all names, and delete reports of contents that no name has any more."""
        with self._connection() as db:
            rows = db.execute("SELECT name, number, state FROM states WHERE is_named").fetchall()
            digests = {str(row[0]) for row in db.execute("SELECT digest FROM reports")}
        for name, number, text in rows:
            try:
                state = NameState.from_json(text, name, number)
            except StoredAdapterDamaged as error:
                raise StoreError(f"{error}; {_REMEDY}") from error
            digests.difference_update(each.content.digest for each in state.revisions)
            apply(state)
        for digest in digests:
            self.forget_content(digest)
        return True

    @contextmanager
    def change(
        self, name: str, transition: Transition, report: LoadReport | None = None
    ) -> Iterator[Change]:
        with self._transaction() as db:
            before = self._read(db, name)
            after = transition(before)
            _write_state(db, after)
            if report is not None:
                assert after.record is not None
                _write_report(db, after.record.digest, report)
        yield Change(before, after)

    def report(self, content: Content) -> LoadReport:
        with self._connection() as db:
            query = "SELECT report FROM reports WHERE digest = ?"
            row = db.execute(query, (content.digest,)).fetchone()
        if row is None:
            raise UnknownAdapter(content.digest)
        return LoadReport.from_json(json.loads(row[0]))

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        with self._connection() as db:
            return self._read(db, name).history

    def forget_content(self, digest: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM reports WHERE digest = ?", (digest,))

    def restore(self, states: Iterable[NameState], reports: Mapping[str, LoadReport]) -> None:
        """Write these records into an empty registry."""
        with self._transaction() as db:
            for state in states:
                _write_state(db, state)
            for digest, report in reports.items():
                _write_report(db, digest, report)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _read(self, db: sqlite3.Connection, name: str) -> NameState:
        query = "SELECT number, state FROM states WHERE name = ?"
        row = db.execute(query, (name,)).fetchone()
        return NameState(name) if row is None else NameState.from_json(row[1], name, row[0])

    def _prepare_tables(self) -> None:
        """Create the tables of a new file. Raises StoreError for the schema of another version."""
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version == SCHEMA:
            return
        if version:
            raise StoreError(
                f"the registry has schema {version}, this version of loraplex reads {SCHEMA}: use "
                "the version that wrote it, or add the adapters again in an empty --state-dir"
            )
        with self._transaction() as db:
            db.execute(
                "CREATE TABLE states (name TEXT PRIMARY KEY, number INTEGER NOT NULL,"
                " is_named INTEGER NOT NULL, state BLOB NOT NULL) STRICT"
            )
            db.execute(
                "CREATE TABLE reports (digest TEXT PRIMARY KEY, report TEXT NOT NULL) STRICT"
            )
            db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run one transaction. Raises sqlite3.Error, after a rollback."""
        with self._connection() as db:
            if db.in_transaction:  # the last transaction could not even be rolled back
                db.execute("ROLLBACK")
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite itself rolls back after some errors
                    with suppress(sqlite3.Error):  # tried again before the next transaction
                        db.execute("ROLLBACK")
                raise
            worked("catalogue")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Use the connection, one thread at a time. Failures are reported."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                _log.error("the registry failed: %s", error, extra={"part": "catalogue"})
                raise


def _write_state(db: sqlite3.Connection, state: NameState) -> None:
    db.execute(
        "INSERT INTO states VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
        " number = excluded.number, is_named = excluded.is_named, state = excluded.state",
        (state.name, state.number, bool(state.revisions), state.to_json()),
    )


def _write_report(db: sqlite3.Connection, digest: str, report: LoadReport) -> None:
    text = json.dumps(report.to_json())
    db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?)", (digest, text))
