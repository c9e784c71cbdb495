"""Chosen on validation alone, then tested once: the rule, and where it is written down.

choice.json        what validation chose, and the digest of the cells that it was chosen by
test_runs.jsonl    every test run that was begun: commit, date, choice; committed

A run goes on in as many sittings as it takes, with further arms, numbers of examples and draws,
while what decides a result (`DECIDING`) is that of its first commit. No cell is measured twice.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .cells import CellFile
from .held_out import digest_of_test_set
from .summary import by_recipe

__all__ = ["DECIDING", "Choice", "LedgerRefused", "TestLedger", "choose"]

DECIDING = (
    "adapter_store/loraplex_generation",
    ":(exclude)adapter_store/loraplex_generation/cli",
    *(f"adapter_store/benchmarks/few_shot/{name}.py" for name in ("arms", "bench", "held_out")),
    *(f"adapter_store/benchmarks/few_shot/{name}.py" for name in ("lorahub", "measuring")),
    "adapter_store/benchmarks/few_shot/test_set.jsonl",
)  # paths of the repository, as git takes them


class LedgerRefused(Exception):
    """A test run that the rule does not allow; the message says what would be needed."""


@dataclass(frozen=True, slots=True)
class Choice:
    recipe: Mapping[str, float]  # what differs from the default RefinementRecipe
    validation_cells: str  # SHA-256 of the file that it was chosen by
    n_cells: int
    date: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Choice:
        """Raises LedgerRefused if nothing was chosen yet."""
        if not path.is_file():
            raise LedgerRefused(f"no {path.name}: choose on validation first (`choose`)")
        return cls(**json.loads(path.read_text()))


def choose(kept: CellFile) -> Choice:
    """The recipe with the lowest mean NLL over (task, k, draw) that every recipe was run on.

    Raises LedgerRefused for a file without such cells.
    """
    found = by_recipe(kept)
    if not found:
        raise LedgerRefused(f"{kept.path.name} has no cells on which recipes could be compared")
    best = min(found, key=lambda recipe: found[recipe].nll.mean)
    return Choice(
        dict(best), _sha256(kept.path.read_bytes()), len(kept), datetime.now(UTC).date().isoformat()
    )


class TestLedger:
    """Of one repository; owner of its file."""

    __test__ = False

    def __init__(self, path: Path, repository: Path, deciding: Sequence[str] = DECIDING) -> None:
        self._path, self._repository, self._deciding = path, repository, deciding

    def begin(
        self, choice: Choice, *, out: Path, rows: int, budget_s: float, again: bool = False
    ) -> None:
        """Notes the run, or finds it as one that was begun before and goes on.

        `out`: the file of its cells. Raises LedgerRefused for changes that are not committed, and
        for a second run unless `again`.
        """
        commit = self._clean_commit(out)
        entry = {
            "test_set": digest_of_test_set(),
            "choice": asdict(choice),
            "cells": out.name,
            "rows": rows,
            "budget_s": budget_s,
        }
        earlier = self._entries()
        if any(entry.items() <= run.items() and self._same_code(run["commit"]) for run in earlier):
            return
        if earlier and not again:
            last = earlier[-1]
            raise LedgerRefused(
                f"the test was run on {last['date']} at commit {last['commit'][:12]}; a second "
                "look makes it a validation set. It goes on with the same choice, rows, budget and "
                "--out from a checkout in which what decides results is as it was there. --again "
                "notes another run all the same"
            )
        dated = {"date": datetime.now(UTC).date().isoformat(), "commit": commit, **entry}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dated) + "\n")

    def _entries(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def _same_code(self, commit: str) -> bool:
        """Whether what decides results is as it was at `commit`."""
        words = ["git", "-C", str(self._repository), "diff", "--quiet", commit, "HEAD", "--"]
        return subprocess.run([*words, *self._deciding], check=False).returncode == 0

    def _clean_commit(self, out: Path) -> str:
        """HEAD, if nothing else than the run's own files has changed since."""
        ours = {path.resolve() for path in (self._path, out)}
        changed = [
            line[3:]
            for line in self._git("status", "--porcelain", "--untracked-files=all").splitlines()
            if (self._repository / line[3:].strip('"')).resolve() not in ours
        ]
        if changed:
            raise LedgerRefused(f"commit first, so that the run has a name: {', '.join(changed)}")
        return self._git("rev-parse", "HEAD").strip()

    def _git(self, *words: str) -> str:
        command = ["git", "-C", str(self._repository), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
