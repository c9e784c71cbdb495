"""Checks a store's directory, and repairs it without deleting anything that may still be good.

    registry.sqlite3 ──▶ names ──▶ revisions ──▶ contents/ab/<digest> ──▶ config, weights, plan

A repair copies the registry to ``damaged/<time>/`` and moves files there that it takes out of use.
It deletes only staged files and prepared forms (``packed/``), which servers make again.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from .contents.content_check import check_content
from .contents.content_files import is_locked, lock_directory
from .contents.packed_files import read_packed
from .errors import StoredAdapterDamaged, StoreError
from .limits import StoreLimits
from .names.name_record import Content
from .names.name_registry import REGISTRY_FILE, SqliteRegistry
from .names.name_syntax import tenant_of
from .names.registry_salvage import Salvage, copy_registry, read_registry, rebuild_registry

_MOVES = "moves to damaged/"


class Problem(NamedTuple):
    subject: str
    text: str
    repair: str  # what a repair does
    is_damage: bool = True  # False: a left-over, which costs only its bytes


@dataclass
class Findings:
    """The state of a directory."""

    registry: Salvage
    problems: list[Problem] = field(default_factory=list)
    damaged: dict[str, Path] = field(default_factory=dict)  # folders of contents, by digest
    described: dict[str, Content] = field(default_factory=dict)  # where a record is wrong
    moved: list[Path] = field(default_factory=list)
    deleted: list[Path] = field(default_factory=list)
    n_contents: int = 0

    @property
    def n_names(self) -> int:
        return sum(bool(state.revisions) for state in self.registry.states.values())

    @property
    def is_damaged(self) -> bool:
        return any(problem.is_damage for problem in self.problems)


def verify(root: Path, limits: StoreLimits) -> Findings:
    """Check every byte and change nothing. Raises StoreError unless ``root`` is a store's.

    While a server has the directory open, left-overs are not reported, and damage is looked at
    twice, because names and files may change meanwhile.
    """
    found = _inspect(root, limits)
    if found.problems and is_locked(root):
        again = _inspect(root, limits)
        again.problems = [p for p in again.problems if p.is_damage and p in found.problems]
        return again
    return found


def repair(root: Path, limits: StoreLimits) -> Findings:
    """Repair the directory, and return what was wrong. Raises StoreError while a server runs."""
    unlock = lock_directory(root)
    try:
        found = _inspect(root, limits)
        if found.is_damaged:
            _take_out_damage(root, found)
        for path in found.deleted:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        unlock()
    return found


def _take_out_damage(root: Path, found: Findings) -> None:
    """Move files first: files without a name would be deleted by the next start of a server."""
    target, path = root / "damaged" / time.strftime("%Y%m%dT%H%M%S"), root / REGISTRY_FILE
    target.mkdir(parents=True)
    copy_registry(path, target)
    for each in (*found.damaged.values(), *found.moved):
        if each.exists():
            each.rename(target / each.name)
    if found.registry.problems:
        rebuild_registry(path, found.registry)
    with closing(SqliteRegistry(path)) as registry:
        for name, state in found.registry.states.items():
            if any(r.record.digest in {*found.damaged, *found.described} for r in state.revisions):
                with registry.change(
                    name, lambda state: state.without(found.damaged).described(found.described)
                ):
                    pass


def _inspect(root: Path, limits: StoreLimits) -> Findings:
    contents = root / "contents"
    if not contents.is_dir() and not (root / REGISTRY_FILE).exists():
        raise StoreError(f"{root} is not the state directory of a server: no {REGISTRY_FILE} in it")
    found = Findings(read_registry(root / REGISTRY_FILE))
    for subject, text in found.registry.problems:
        found.problems.append(Problem(subject, text, "the registry keeps its readable records"))
    named: dict[str, dict[str, Content]] = {}  # digest → name → content
    for name, state in found.registry.states.items():
        for each in state.revisions:
            named.setdefault(each.record.digest, {})[name] = each.content
    found.n_contents = len(named)
    texts: dict[str, str] = {}
    for digest, uses in named.items():
        folder = contents / digest[:2] / digest
        try:
            content = _check_files(folder, uses, limits)
        except (StoredAdapterDamaged, OSError) as error:
            found.damaged[digest], texts[digest] = folder, str(error)
            continue
        for name in (name for name, described in uses.items() if described != content):
            found.described[digest] = content
            text = f"its record describes other files than the {content.disk_bytes} bytes there"
            found.problems.append(Problem(f"adapter {name}", text, "its record is corrected"))
        if digest not in found.registry.reports:
            subject, text = f"content {digest[:12]}", "its load report is missing"
            found.problems.append(Problem(subject, text, "none: add the adapter again"))
    for digest, text in texts.items():
        found.problems.append(Problem(f"content {digest[:12]}", text, _fate(digest, found)))
    _find_left_overs(root, named, found)
    return found


def _check_files(folder: Path, uses: Mapping[str, Content], limits: StoreLimits) -> Content:
    """Return the description that fits the files. Raises StoredAdapterDamaged or OSError.

    Names with an equal adapter share the files, and only the last one may describe the plan.
    """
    if not folder.is_dir():
        raise StoredAdapterDamaged("its files are missing")
    files = {file.name: file for file in folder.iterdir()}
    if not all(os.access(file, os.R_OK) for file in files.values()):
        raise StoreError(f"{folder} cannot be read: run the command as the user of the server")
    n_bytes = sum(file.stat().st_size for file in files.values())
    error = StoredAdapterDamaged("no name has it")
    for content, name in {content: name for name, content in uses.items()}.items():
        try:
            check_content(content, tenant_of(name), files, limits)
            return replace(content, disk_bytes=n_bytes)
        except StoredAdapterDamaged as damage:
            error = damage
    raise error


def _fate(digest: str, found: Findings) -> str:
    """Say what becomes of a damaged content and of the names that have it now."""
    fates = [_MOVES]
    for name, state in found.registry.states.items():
        if state.record is not None and state.record.digest == digest:
            good = (
                r.record.revision for r in state.revisions if r.record.digest not in found.damaged
            )
            revision = next(good, None)
            fate = "is removed" if revision is None else f"falls back to revision {revision}"
            fates.append(f"{name} {fate}")
    return ", ".join(fates)


def _find_left_overs(root: Path, named: Mapping[str, object], found: Findings) -> None:
    """Find files that no name leads to, and prepared forms that cannot be used."""
    unnamed = [path for path in _by_digest(root / "contents") if path.name not in named]
    if found.registry.problems:  # a lost record may have named them
        found.moved += unnamed
    else:
        found.deleted += unnamed
    for path in _by_digest(root / "packed"):
        if path.name not in named or path.name in found.damaged or read_packed(path) is None:
            found.deleted.append(path)
    found.deleted += sorted((root / "staging").glob("*"))
    for path in (*found.moved, *found.deleted):
        fate = _MOVES if path in found.moved else "is deleted, as by the next start of a server"
        subject = str(path.relative_to(root))
        found.problems.append(Problem(subject, "it is left over", fate, is_damage=False))


def _by_digest(folder: Path) -> Iterator[Path]:
    for group in sorted(folder.glob("*")):
        yield from sorted(group.iterdir()) if group.is_dir() else [group]
