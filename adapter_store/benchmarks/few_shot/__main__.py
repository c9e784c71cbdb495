"""Adapters from a sentence and k examples, beside what else one can do with them.

python -m adapter_store.benchmarks.few_shot plan      how long what would take
python -m adapter_store.benchmarks.few_shot run       on validation tasks, or on the library's tests
python -m adapter_store.benchmarks.few_shot sweep     recipes, on validation tasks; resumable
python -m adapter_store.benchmarks.few_shot choose    the recipe, by the sweep
python -m adapter_store.benchmarks.few_shot test      once, with what was chosen; resumable
python -m adapter_store.benchmarks.few_shot report    tables and a plot from files of cells
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from loraplex_generation.zoo.novelty import NOVELTIES, novelty
from loraplex_generation.zoo.tasks import Task

from .arms import ARMS
from .cells import Cell, CellFile
from .held_out import HeldOutTask, load_test_set
from .ledger import Choice, LedgerRefused, TestLedger, choose
from .planning import GRID, Pace, blocks_of, fitting, plan, sweep
from .summary import plot, recipe_table, report

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
T = TypeVar("T")
CHOICE, LEDGER = HERE / "choice.json", HERE / "test_runs.jsonl"
KS = [16, 0, 4, 8, 2, 32]  # in this order
_SETS = ("validation", "h1", "h2", "h3")

app = typer.Typer(help=__doc__, rich_markup_mode=None)

_Out = Annotated[Path, typer.Option(help="File of cells, JSON lines.")]
_Arms = Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ARMS)}. Default: all.")]
_Ks = Annotated[
    list[int] | None, typer.Option(help="Numbers of examples, in order. Default: 16 0 4 8 2 32.")
]
_Draws = Annotated[int, typer.Option(help="Draws of examples.", min=1)]
_Rows = Annotated[int, typer.Option(help="Rows that a task is scored on.", min=1, max=100)]
_Budget = Annotated[float, typer.Option(help="Seconds to learn in; 0: each arm's own recipe.")]
_Minutes = Annotated[float | None, typer.Option(help="As many whole blocks as fit. Default: all.")]
_Base = Annotated[str | None, typer.Option(help="Base model; default: the pulled one.")]
_Library = Annotated[Path | None, typer.Option(help="Folder of the library. Default: shipped.")]
_Zoo = Annotated[Path | None, typer.Option(help="Folder with the multi-task LoRA.")]
_Split = Annotated[str, typer.Option(help="Whose tasks: `wide` or `shipped`.")]
_Set = Annotated[
    str, typer.Option("--set", help="`validation`, or of `shipped` its tests: h1, h2, h3.")
]
_New = Annotated[
    str | None,
    typer.Option(
        help=f"Only tasks of which this is new: {', '.join(NOVELTIES[1:])}. Default: all."
    ),
]


@app.command("plan")
def show_plan(
    out: _Out = HERE / "validation.jsonl",
    split: _Split = "wide",
    of_set: _Set = "validation",
    new: _New = None,
    arm: _Arms = None,
    k: _Ks = None,
    draws: _Draws = 5,
    rows: _Rows = 100,
    budget_s: _Budget = 0.0,
    minutes: _Minutes = None,
    zoo: _Zoo = None,
) -> None:
    """How many cells a run has and how long they take, by what the file has measured."""
    kept = CellFile(out)
    cells = plan(
        _names(split, new, of_set),
        arms=_arms(arm, zoo),
        ks=k or KS,
        n_draws=draws,
        rows=rows,
        budget_s=budget_s,
    )
    chosen = cells if minutes is None else fitting(cells, kept, 60 * minutes)
    pace = Pace(kept)
    for name in dict.fromkeys(cell.arm for cell in chosen):
        of = [cell for cell in chosen if cell.arm == name]
        left = [cell for cell in of if cell not in kept]
        typer.echo(f"{name:14} {len(left):6} of {len(of):6} cells {pace.total(left) / 3600:7.2f} h")
    left = [cell for cell in chosen if cell not in kept]
    hours = pace.total(left) / 3600
    typer.echo(f"{len(left)} cells in {len(blocks_of(left))} blocks: {hours:.1f} h of one thread")


@app.command()
def run(
    out: _Out = HERE / "validation.jsonl",
    split: _Split = "wide",
    of_set: _Set = "validation",
    new: _New = None,
    arm: _Arms = None,
    k: _Ks = None,
    draws: _Draws = 5,
    rows: _Rows = 100,
    budget_s: _Budget = 0.0,
    minutes: _Minutes = None,
    base: _Base = None,
    library: _Library = None,
    zoo: _Zoo = None,
) -> None:
    """The arms on validation tasks, or on those that tested the library."""
    kept = CellFile(out)
    cells = plan(
        _names(split, new, of_set),
        arms=_arms(arm, zoo),
        ks=k or KS,
        n_draws=draws,
        rows=rows,
        budget_s=budget_s,
    )
    _measure(cells, kept, _held_out(split, of_set, rows), minutes, base, library, zoo)


@app.command("sweep")
def run_sweep(
    out: _Out = HERE / "sweep.jsonl",
    split: _Split = "wide",
    recipe: Annotated[
        list[int] | None, typer.Option(help=f"Of the grid, 0 to {len(GRID) - 1}. Default: all.")
    ] = None,
    k: Annotated[int, typer.Option(help="Examples.", min=2)] = 8,
    draws: _Draws = 2,
    rows: _Rows = 24,
    minutes: _Minutes = None,
    base: _Base = None,
    library: _Library = None,
) -> None:
    """Recipes on validation tasks; the summary compares what every recipe was run on."""
    kept = CellFile(out)
    grid = [GRID[i] for i in recipe] if recipe else GRID
    cells = sweep(_names(split), k=k, n_draws=draws, rows=rows, grid=grid)
    _measure(cells, kept, _held_out(split, "validation", rows), minutes, base, library, None)
    typer.echo(recipe_table(kept))


@app.command("choose")
def write_choice(sweep_file: _Out = HERE / "sweep.jsonl", choice: Path = CHOICE) -> None:
    """Writes down which recipe the sweep chooses; the test reads it."""
    made = _or_exit(lambda: choose(CellFile(sweep_file)))
    made.save(choice)
    typer.echo(f"{choice.name}: {dict(made.recipe) or 'the default'}")


@app.command("test")
def run_test(
    out: _Out = HERE / "test.jsonl",
    new: _New = None,
    arm: _Arms = None,
    k: _Ks = None,
    draws: _Draws = 5,
    rows: _Rows = 100,
    budget_s: _Budget = 0.0,
    minutes: _Minutes = None,
    again: Annotated[bool, typer.Option("--again", help="Note another run of the test.")] = False,
    base: _Base = None,
    library: _Library = None,
    zoo: _Zoo = None,
) -> None:
    """The arms on the test set, with the recipe that was chosen. Once, in one or more sittings."""
    kept, held = CellFile(out), load_test_set()
    choice = _or_exit(lambda: Choice.load(CHOICE))
    cells = plan(
        _only(list(held), "wide", new),
        arms=_arms(arm, zoo),
        ks=k or KS,
        n_draws=draws,
        rows=rows,
        budget_s=budget_s,
        recipe=choice.recipe,
    )
    ledger = TestLedger(LEDGER, HERE.parents[2])
    _or_exit(lambda: ledger.begin(choice, out=out, rows=rows, budget_s=budget_s, again=again))
    _measure(cells, kept, held, minutes, base, library, zoo)


@app.command("report")
def write_report(
    cells: Annotated[list[Path], typer.Argument(help="Files of cells.")],
    out: Annotated[Path | None, typer.Option(help="Markdown; a plot beside it.")] = None,
    trained: Annotated[str, typer.Option(help="On which tasks the library was.")] = "shipped",
) -> None:
    """Tables and, with `--out`, a plot."""
    from loraplex_generation.zoo.split import load_split

    kept = [measured for path in cells for measured in CellFile(path)]
    try:
        text = report(kept, load_split(trained).sets["train"])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
        plot(kept, out.with_suffix(".svg"))


def _measure(
    cells: Sequence[Cell],
    kept: CellFile,
    held: Mapping[str, HeldOutTask],
    minutes: float | None,
    base: str | None,
    library: Path | None,
    zoo: Path | None,
) -> None:
    import torch

    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_server.model.pull import DEFAULT_BASE, resolve_encoder, resolve_model

    from .bench import Bench
    from .measuring import Measure, measure_all

    torch.set_num_threads(1)
    chosen = cells if minutes is None else fitting(cells, kept, 60 * minutes)
    folder = library or shipped_folder()
    bench = Bench.load(
        resolve_model(base),
        folder,
        SentenceEncoder(resolve_encoder()),
        base_name=base or DEFAULT_BASE,
        multi_task=_multi_task(zoo, folder),
    )
    measure_all(Measure(bench, held), chosen, kept)


def _multi_task(zoo: Path | None, library: Path) -> Tensor | None:
    from loraplex_generation.zoo_training import ZooTraining

    return ZooTraining(zoo, library).multi_task() if zoo is not None else None


def _arms(asked: Sequence[str] | None, zoo: Path | None) -> list[str]:
    """Known ones; the multi-task arm only where its adapter is."""
    unknown = [name for name in asked or () if name not in ARMS]
    if unknown:
        raise typer.BadParameter(f"no arm {unknown}; known: {', '.join(ARMS)}")
    return [name for name in asked or ARMS if zoo is not None or not ARMS[name].needs_multi_task]


def _names(split: str, new: str | None = None, of: str = "validation") -> Sequence[str]:
    from loraplex_generation.zoo.split import load_split

    sets = {k: v for k, v in load_split(split).sets.items() if k in _SETS}  # no test of `wide`
    if of not in sets:
        raise typer.BadParameter(f"{split!r} has no set {of!r} to run; it has {', '.join(sets)}")
    return _only(sets[of], split, new)


def _only(names: Sequence[str], split: str, new: str | None) -> Sequence[str]:
    """Those of which `new` is new for the training tasks of the split; None: all."""
    from loraplex_generation.zoo.split import load_split

    if new is None:
        return names
    if new not in NOVELTIES[1:]:
        raise typer.BadParameter(f"nothing is called {new!r}; known: {', '.join(NOVELTIES[1:])}")
    trained = [Task.parse(name) for name in load_split(split).sets["train"]]
    return [name for name in names if novelty(Task.parse(name), trained) == new]


def _held_out(split: str, of: str, rows: int) -> Mapping[str, HeldOutTask]:
    from .measuring import held_out_tasks

    rows_of = "validation" if of == "validation" else "test"
    return held_out_tasks(_names(split, of=of), rows, split=rows_of)


def _or_exit(call: Callable[[], T]) -> T:
    try:
        return call()
    except LedgerRefused as refused:
        typer.echo(str(refused), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
