"""Reads what is whole in a registry's file, and writes a new file with it."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from loraplex_adapter_store.errors import StoredAdapterDamaged, StoreError
from loraplex_adapter_store.report import LoadReport

from .name_registry import SCHEMA, SqliteRegistry
from .name_state import NameState


class Salvage(NamedTuple):
    """The whole records of a registry."""

    states: dict[str, NameState]  # by name, deleted names too
    reports: dict[str, LoadReport]  # by digest
    problems: list[tuple[str, str]]  # subject, and what is wrong with it


def read_registry(path: Path) -> Salvage:
    """Read each record on its own, and change nothing.

    Raises StoreError for a registry of another version.
    """
    found = Salvage({}, {}, [])
    if not path.exists():
        found.problems.append((path.name, "the file is missing"))
        return found
    # Without a log to read, SQLite need not write files of its own beside this one.
    how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
    with closing(sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True)) as db:
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as error:
            found.problems.append((path.name, str(error)))
            return found
        if version not in (0, SCHEMA):
            raise StoreError(
                f"{path} has schema {version}, this version of loraplex reads {SCHEMA}: use the "
                "version that wrote it"
            )
        lines = [str(line) for (line,) in _rows(db, "PRAGMA integrity_check")]
        if version == 0 or lines != ["ok"]:
            problem = lines[0] if version else "it holds no tables"
            found.problems.append((path.name, problem.splitlines()[-1] if problem else "damaged"))
        for name, row in _records(db).items():
            try:
                found.states[name] = NameState.from_json(*row)
            except (TypeError, StoredAdapterDamaged):
                found.problems.append((f"adapter {name}", "its record is damaged"))
        for digest, text in _rows(db, "SELECT digest, report FROM reports"):
            try:
                found.reports[digest] = LoadReport.from_json(json.loads(text))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # as if there were none
    return found


def rebuild_registry(path: Path, found: Salvage) -> None:
    """Replace the file by a new one with these records."""
    new = path.with_name("registry.new")
    new.unlink(missing_ok=True)
    with closing(SqliteRegistry(new)) as registry:
        registry.restore(found.states.values(), found.reports)
    for suffix in ("-wal", "-shm"):  # they would be applied to the new file
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    new.replace(path)


def copy_registry(path: Path, folder: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy2(file, folder)


def _records(db: sqlite3.Connection) -> dict[str, tuple[Any, ...]]:
    """Return (state, name, number) by name; an empty tuple for a row that cannot be read."""
    whole = "SELECT state, name, number FROM states NOT INDEXED"
    one = "SELECT state, name, number FROM states WHERE name = ?"
    rows = {row[1]: row for row in _rows(db, whole)}
    for (name,) in _rows(db, "SELECT name FROM states"):  # from the index, on other pages
        if name not in rows:
            rows[name] = next(_rows(db, one, name), ())
    return rows


def _rows(db: sqlite3.Connection, query: str, *values: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows before the first damaged page."""
    try:
        yield from db.execute(query, values)
    except sqlite3.Error:
        return
