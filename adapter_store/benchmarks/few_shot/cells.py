"""The unit of a measurement, and the file that keeps what was measured: one JSON line a cell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Cell", "CellFile", "Measured"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on one task, with one draw of k examples."""

    task: str
    arm: str
    k: int  # examples
    draw: int  # which examples: the same for every arm
    rows: int  # that the result is scored on
    budget_s: float = 0.0  # to learn in; 0: until the arm's own recipe ends
    recipe: tuple[tuple[str, float], ...] = ()  # what differs from the default RefinementRecipe

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def operation(self) -> str:
        return self.task.split("/")[0].split(".")[0]


@dataclass(frozen=True, slots=True)
class Measured:
    cell: Cell
    exact: float  # share of the rows whose greedy reply is the answer
    nll: float  # nats per answer token
    learn_s: float  # wall clock, until the adapter or the prompt is there
    learn_cpu_s: float  # of the process: what a busy machine does not stretch
    score_s: float
    told: Mapping[str, Any] = field(default_factory=dict)  # what the arm says of itself


class CellFile:
    """Appends, one line a cell; what it holds is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._measured = {m.cell.key: m for m in _read(path)}

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self._measured

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._measured.values())

    def __len__(self) -> int:
        return len(self._measured)

    def add(self, measured: Measured) -> None:
        """On disk when it returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(measured), ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._measured[measured.cell.key] = measured


def _read(path: Path) -> Iterator[Measured]:
    """A last line that a killed process left half written is dropped, and cut off the file."""
    if not path.is_file():
        return
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        path.write_bytes(kept)
    for line in kept.decode("utf-8").splitlines():
        data = json.loads(line)
        cell = data.pop("cell")
        recipe = tuple((name, value) for name, value in cell.pop("recipe"))
        yield Measured(Cell(**cell, recipe=recipe), **data)
