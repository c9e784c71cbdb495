"""One cell measured, and many in a row with a bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraplex_generation.refinement import RefinementRecipe
from loraplex_generation.zoo.tasks import Example, Task

from .arms import ARMS, Asked
from .bench import Bench
from .cells import Cell, CellFile, Measured
from .held_out import HeldOutTask

__all__ = ["Measure", "held_out_tasks", "measure_all"]


class Measure:
    """`held_out`: sentences and rows of the tasks that cells may name."""

    def __init__(
        self,
        bench: Bench,
        held_out: Mapping[str, HeldOutTask],
        recipe: RefinementRecipe = RefinementRecipe(),  # noqa: B008  frozen value
    ) -> None:
        self._bench, self._held_out, self._recipe = bench, held_out, recipe

    def __call__(self, cell: Cell) -> Measured:
        held = self._held_out[cell.task]
        asked = Asked(
            held.task,
            held.wordings[0],
            _examples(held.task, cell),
            replace(self._recipe, **dict(cell.recipe)),  # type: ignore[arg-type]
            seed=cell.draw,
            budget_s=cell.budget_s,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        learnt = ARMS[cell.arm].learn(self._bench, asked)
        learn_s, learn_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        wall = time.perf_counter()
        score = self._bench.score(
            held.rows[: cell.rows], learnt.vector, learnt.instruction, learnt.earlier
        )
        return Measured(
            cell,
            exact=round(score.exact, 4),
            nll=round(score.nll, 4),
            learn_s=round(learn_s, 2),
            learn_cpu_s=round(learn_cpu_s, 2),
            score_s=round(time.perf_counter() - wall, 2),
            told={k: v for k, v in learnt.told.items() if k not in ("seconds", "finished")},
        )


def measure_all(measure: Callable[[Cell], Measured], cells: Sequence[Cell], kept: CellFile) -> None:
    """Those that the file does not hold, in order; a killed run goes on where it was."""
    left = [cell for cell in cells if cell not in kept]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(left))
        for cell in left:
            progress.update(bar, description=f"{cell.task} {cell.arm} k={cell.k}")
            kept.add(measure(cell))
            progress.advance(bar)


def held_out_tasks(
    names: Sequence[str], n_rows: int, *, split: str = "validation"
) -> dict[str, HeldOutTask]:
    """Tasks that nothing was trained on, scored on their rows of `split`."""
    tasks = [Task.parse(name) for name in names]
    return {
        task.name: HeldOutTask(
            task, tuple(task.test_descriptions()), tuple(task.examples(split, n_rows))
        )
        for task in tasks
    }


def _examples(task: Task, cell: Cell) -> list[Example]:
    """Of one draw, more examples contain the fewer."""
    n = cell.k if ARMS[cell.arm].has_draws else 0
    return task.examples("train", n, seed=cell.draw)
