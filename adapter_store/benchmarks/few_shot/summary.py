"""What the cells say: tables with intervals clustered by operation, and a plot over k."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeVar

from loraplex_generation.zoo.novelty import NOVELTIES, novelty
from loraplex_generation.zoo.tasks import Task

from ..evaluation.statistics import Difference, clustered_mean, paired_difference
from .arms import ARMS, ORACLE_K
from .cells import Cell, Measured

__all__ = ["RecipeScore", "by_recipe", "plot", "recipe_table", "report"]

Recipe = tuple[tuple[str, float], ...]
K = TypeVar("K")


class RecipeScore(NamedTuple):
    exact: Difference
    nll: Difference
    gained: Difference  # NLL of the default recipe less its own: above zero is better
    n: int


def report(cells: Sequence[Measured], trained: Sequence[str]) -> str:
    """Markdown: every arm by k, ours against the others, all by what is new about a task.

    `trained`: the tasks of the library. Raises ValueError for cells of several recipes, which a
    mean would mix.
    """
    recipes = {m.cell.recipe for m in cells if ARMS[m.cell.arm].has_draws}
    if len(recipes) > 1:
        raise ValueError(f"cells of {len(recipes)} recipes; `sweep` compares recipes")
    parts = [_about(cells), "## Every arm, by number of examples", _arms_table(cells)]
    parts += ["## Ours against the others, at equal k", _differences_table(cells)]
    parts += [
        "## Exact match by what is new about the task",
        _novelty_table(cells, [Task.parse(name) for name in trained]),
    ]
    return "\n\n".join(parts) + "\n"


def by_recipe(cells: Iterable[Measured]) -> dict[Recipe, RecipeScore]:
    """Over the (task, k, draw) that every recipe was run on; empty without any."""
    runs: dict[Recipe, dict[tuple[str, int, int], Measured]] = {}
    for measured in cells:
        cell = measured.cell
        if cell.arm == "ours" and cell.k:
            runs.setdefault(cell.recipe, {})[cell.task, cell.k, cell.draw] = measured
    if not runs or () not in runs:
        return {}
    shared = sorted(set.intersection(*[set(of) for of in runs.values()]))
    if not shared:
        return {}
    clusters = [runs[()][key].cell.operation for key in shared]
    default = [runs[()][key].nll for key in shared]

    def scored(of: Mapping[tuple[str, int, int], Measured]) -> RecipeScore:
        nll = [of[key].nll for key in shared]
        return RecipeScore(
            clustered_mean([of[key].exact for key in shared], clusters),
            clustered_mean(nll, clusters),
            paired_difference(default, nll, clusters),
            len(shared),
        )

    return {recipe: scored(of) for recipe, of in runs.items()}


def recipe_table(cells: Iterable[Measured]) -> str:
    rows = [
        [
            _told(recipe),
            str(score.n),
            _interval(score.exact, ".0%"),
            _interval(score.nll, ".2f"),
            _interval(score.gained, "+.3f"),
        ]
        for recipe, score in by_recipe(cells).items()
    ]
    return _table(["recipe", "runs", "exact", "NLL", "NLL gained on the default"], rows)


def plot(cells: Iterable[Measured], path: Path) -> None:
    """Exact match over k, a line an arm. Needs matplotlib, which the extra `load` brings."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups = _grouped(cells, lambda cell: (cell.arm, cell.k))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for arm in ARMS:
        ks = sorted(k for name, k in groups if name == arm)
        if not ks:
            continue
        means = [clustered_mean(*_values(groups[arm, k], "exact")).mean for k in ks]
        if ks == [ORACLE_K] or ks == [0]:
            axes.axhline(means[0], linestyle=":", linewidth=1, label=arm, color="grey")
        else:
            axes.plot([k or 1 for k in ks], means, marker="o", label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("examples (leftmost: the sentence alone)")
    axes.set_ylabel("exact match")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _about(cells: Sequence[Measured]) -> str:
    tasks = {m.cell.task for m in cells}
    operations = {m.cell.operation for m in cells}
    draws = {m.cell.draw for m in cells}
    lines = [
        f"{len(cells)} cells: {len(tasks)} tasks of {len(operations)} operations, "
        f"{len(draws)} draws of examples, {max(m.cell.rows for m in cells)} rows a task.",
        "Means with 95 % intervals from a bootstrap that draws whole operations.",
    ]
    lines += [f"- `{name}`: {arm.about}" for name, arm in ARMS.items() if _has(cells, name)]
    return "\n".join(lines)


def _has(cells: Sequence[Measured], arm: str) -> bool:
    return any(m.cell.arm == arm for m in cells)


def _arms_table(cells: Sequence[Measured]) -> str:
    groups = _grouped(cells, lambda cell: (cell.arm, cell.k, cell.budget_s))
    order = list(ARMS)
    rows = [
        [
            arm,
            str(k),
            f"{budget_s:g} s" if budget_s else "",
            str(len({m.cell.task for m in of})),
            _interval(clustered_mean(*_values(of, "exact")), ".0%"),
            _interval(clustered_mean(*_values(of, "nll")), ".2f"),
            f"{median(m.learn_s for m in of):.1f}",
            f"{median(m.learn_cpu_s for m in of):.1f}",
        ]
        for (arm, k, budget_s), of in sorted(
            groups.items(), key=lambda item: (item[0][1], item[0][2], order.index(item[0][0]))
        )
    ]
    head = ["arm", "k", "budget", "tasks", "exact", "NLL", "seconds", "CPU seconds"]
    return _table(head, rows)


def _differences_table(cells: Sequence[Measured]) -> str:
    """Paired over (task, k, draw, budget); an arm without draws stands beside each of ours."""
    ours = [m for m in cells if m.cell.arm == "ours"]
    rows = []
    for arm in ARMS:
        theirs = {_pair(m.cell): m for m in cells if m.cell.arm == arm}
        for k in sorted({m.cell.k for m in ours}):
            pairs = [
                (m, theirs[_pair(m.cell, arm)])
                for m in ours
                if m.cell.k == k and _pair(m.cell, arm) in theirs
            ]
            if arm == "ours" or not pairs:
                continue
            clusters = [m.cell.operation for m, _ in pairs]
            exact = paired_difference(
                [a.exact for a, _ in pairs], [b.exact for _, b in pairs], clusters
            )
            nll = paired_difference([b.nll for _, b in pairs], [a.nll for a, _ in pairs], clusters)
            shown = _interval(exact, "+.0%"), _interval(nll, "+.2f")
            rows.append([arm, str(k), str(len(pairs)), *shown])
    head = ["against", "k", "pairs", "exact, ours more", "NLL, ours less"]
    return _table(head, rows)


def _novelty_table(cells: Sequence[Measured], trained: Sequence[Task]) -> str:
    kinds = {task: novelty(Task.parse(task), trained) for task in {m.cell.task for m in cells}}
    names = [name for name in NOVELTIES if name in kinds.values()]
    groups = _grouped(cells, lambda cell: (cell.k, cell.budget_s, cell.arm))
    rows = []
    for (k, budget_s, arm), of in sorted(groups.items()):
        cells_of = [[m for m in of if kinds[m.cell.task] == name] for name in names]
        shown = [_of_tasks(c) if c else "" for c in cells_of]
        rows.append([arm, str(k), f"{budget_s:g} s" if budget_s else "", *shown])
    return _table(["arm", "k", "budget", *names], rows)


def _of_tasks(cells: Sequence[Measured]) -> str:
    n = len({m.cell.task for m in cells})
    return f"{_interval(clustered_mean(*_values(cells, 'exact')), '.0%')}, {n} tasks"


def _pair(cell: Cell, arm: str | None = None) -> tuple[object, ...]:
    """What a cell shares with that of the other arm; None: with its own kind."""
    if not ARMS[arm or cell.arm].has_draws:
        return (cell.task,)
    return cell.task, cell.k, cell.draw, cell.budget_s


def _grouped(cells: Iterable[Measured], key: Callable[[Cell], K]) -> dict[K, list[Measured]]:
    groups: dict[K, list[Measured]] = {}
    for measured in cells:
        groups.setdefault(key(measured.cell), []).append(measured)
    return groups


def _values(cells: Sequence[Measured], metric: str) -> tuple[list[float], list[str]]:
    return [getattr(m, metric) for m in cells], [m.cell.operation for m in cells]


def _interval(found: Difference, form: str) -> str:
    return f"{found.mean:{form}} ({found.low:{form}} … {found.high:{form}})"


def _told(recipe: Recipe) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in recipe) or "default"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *["| " + " | ".join(row) + " |" for row in rows]])
