"""Which cells a measurement has, in which order, and how long they will take."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from .arms import ARMS
from .cells import Cell, CellFile

__all__ = ["GRID", "Pace", "blocks_of", "fitting", "plan", "sweep"]

Recipe = Mapping[str, float]

GRID: tuple[Recipe, ...] = (  # what differs from the default recipe
    {},
    {"lr": 1.5e-3},
    {"a_rate": 0.0},
    {"a_rate": 0.0, "steps": 20, "judged_steps": 24, "tokens": 224},  # near the first one
    {"lr": 6e-3},
    {"steps": 36},
    {"steps": 144},
    {"span_steps": 0},
    {"tokens": 224},
    {"judged_steps": 40},
)
_GUESSES_S = {  # learning with k = 8, one thread, the default base: where nothing was measured yet
    "zero": 45.0,
    "mean": 45.0,
    "lorahub": 20.0,
    "text-to-lora": 45.0,
    "sg-lora": 45.0,
    "icm-lora": 46.0,
    "ours": 45.0,
    "chat": 46.0,
    "both": 46.0,
    "oracle": 90.0,
}
_SCORE_S = 0.12  # of a row


def plan(
    tasks: Sequence[str],
    *,
    arms: Iterable[str],
    ks: Sequence[int],
    n_draws: int,
    rows: int,
    budget_s: float = 0.0,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> list[Cell]:
    """In blocks of one task, k and draw with every arm, so that any beginning is a fair sample.

    Draws are the slowest to change, then k, as given; tasks are shuffled. Arms that have no draws
    come last, once a task.
    """
    order = list(tasks)
    random.Random(seed).shuffle(order)
    told = tuple(sorted((recipe or {}).items()))
    arms = list(arms)
    once = [arm for arm in arms if not ARMS[arm].has_draws]
    cells: list[Cell] = []
    for draw in range(n_draws):
        for k in ks:
            for task in order:
                for arm in arms:
                    if arm not in once and k in ARMS[arm].ks and (k or draw == 0):
                        cells.append(Cell(task, arm, k, draw, rows, budget_s, told))
    return cells + [Cell(task, arm, ARMS[arm].ks[0], 0, rows) for task in order for arm in once]


def sweep(
    tasks: Sequence[str],
    *,
    k: int,
    n_draws: int,
    rows: int,
    grid: Sequence[Recipe] = GRID,
    seed: int = 0,
) -> list[Cell]:
    """Every recipe on one task and draw, then the next: a beginning compares them in pairs."""
    order = list(tasks)
    random.Random(seed).shuffle(order)
    return [
        Cell(task, "ours", k, draw, rows, recipe=tuple(sorted(recipe.items())))
        for draw in range(n_draws)
        for task in order
        for recipe in grid
    ]


class Pace:
    """Seconds of a cell, from what the file has measured, else from a guess."""

    def __init__(self, kept: CellFile) -> None:
        learnt: dict[tuple[str, int], list[float]] = {}
        scored: dict[tuple[str, int], list[float]] = {}
        for measured in kept:
            cell = measured.cell
            learnt.setdefault((cell.arm, cell.k), []).append(measured.learn_s)
            scored.setdefault((cell.arm, cell.k), []).append(measured.score_s / cell.rows)
        self._learn_s = {key: median(values) for key, values in learnt.items()}
        self._row_s = {key: median(values) for key, values in scored.items()}

    def seconds(self, cell: Cell) -> float:
        key = cell.arm, cell.k
        guess = _GUESSES_S.get(cell.arm, 0.0) if cell.k else 0.1
        learning = self._learn_s.get(key, guess)
        if cell.budget_s:
            learning = min(learning, cell.budget_s)
        longer = 1 + cell.k / 8 if cell.arm in ("prompt", "turns", "both", "multi-task") else 1.0
        return learning + cell.rows * self._row_s.get(key, _SCORE_S * longer)

    def total(self, cells: Iterable[Cell]) -> float:
        return sum(self.seconds(cell) for cell in cells)


def fitting(cells: Sequence[Cell], kept: CellFile, seconds: float) -> list[Cell]:
    """The longest beginning, in whole blocks, whose cells that are not kept take `seconds`."""
    pace, chosen, left = Pace(kept), [], seconds
    for block in blocks_of(cells):
        left -= pace.total(cell for cell in block if cell not in kept)
        if left < 0:
            break
        chosen += block
    return chosen


def blocks_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Neighbours of one task, k and draw."""
    blocks: list[list[Cell]] = []
    for cell in cells:
        if blocks and _block(blocks[-1][0]) == _block(cell):
            blocks[-1].append(cell)
        else:
            blocks.append([cell])
    return blocks


def _block(cell: Cell) -> tuple[str, int, int]:
    return cell.task, cell.k, cell.draw
