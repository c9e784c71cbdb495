"""`loraplex generator`: train and judge the maps from a description to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_generation.results import Evaluation

__all__ = ["generator"]

generator = typer.Typer(help="Train and evaluate the generators of adapters from descriptions.")

_Base = Annotated[str | None, typer.Option(help="Base model; default: the pulled one.")]
_Shipped = Annotated[
    Path | None, typer.Option(help="Folder of the library. Default: the package itself.")
]
_Zoo = Annotated[
    Path | None, typer.Option(help="Folder with the oracles. Default: $LORAPLEX_HOME/zoo.")
]
_CANDIDATES = ("end-to-end", "sg-lora", "icm-lora", "weighted", "nearest", "analogy", "ridge")


@generator.command()
def train(
    shipped: _Shipped = None,
    seed: Annotated[int, typer.Option(help="Seed of every map.")] = 0,
    default: Annotated[str, typer.Option(help="The method that `auto` stands for.")] = "end-to-end",
    icm: Annotated[
        bool, typer.Option("--icm/--no-icm", help="ICM-LoRA reads task vectors off the base first.")
    ] = True,
    base: _Base = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train every generator from the library; a few minutes on two cores."""
    import torch
    from rich import print as show

    from loraplex_generation.library import LIBRARY_FILE, Library
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.task_vectors import TaskVectors, train_conditions
    from loraplex_generation.training import train_bundle
    from loraplex_generation.zoo.tasks import Task
    from loraplex_server.model.pull import resolve_encoder, resolve_model

    def say(line: str) -> None:
        show(line, flush=True)

    torch.set_num_threads(threads)
    folder = shipped or shipped_folder()
    conditions = None
    if icm:
        tasks = [Task.parse(name) for name in Library.load(folder / LIBRARY_FILE).tasks]
        reader = TaskVectors.of_directory(resolve_model(base))
        conditions = train_conditions(reader, tasks, say)
    bundle = train_bundle(
        folder,
        SentenceEncoder(resolve_encoder()),
        seed=seed,
        default=default,
        conditions=conditions,
        report=say,
    )
    path = bundle.save(folder)
    show(f"{path.name}  {path.stat().st_size / 1e6:.1f} MB")


@generator.command()
def guard(shipped: _Shipped = None) -> None:
    """Fit the guard against strange descriptions anew, and leave every map as it is."""
    from rich import print as show

    from loraplex_generation.bundle import Bundle
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.training import refit_guard
    from loraplex_server.model.pull import resolve_encoder

    folder = shipped or shipped_folder()
    path = refit_guard(folder, SentenceEncoder(resolve_encoder()))
    show(f"{path.name}  limit {Bundle.load(folder).ood_score.limit:.3f}")


@generator.command()
def default(
    method: Annotated[str, typer.Argument(help="The method that `auto` shall stand for.")],
    shipped: _Shipped = None,
) -> None:
    """Set what `auto` means, as `loraplex generator eval --on validation` advises."""
    from loraplex_generation.bundle import Bundle
    from loraplex_generation.service import METHODS
    from loraplex_generation.shipped import shipped_folder

    if method not in METHODS:
        raise typer.BadParameter(f"known methods: {', '.join(METHODS)}")
    folder = shipped or shipped_folder()
    bundle = Bundle.load(folder)
    bundle.default = method
    bundle.save(folder)


@generator.command(name="eval")
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for results.json, tables and plots.")] = Path(
        "docs/generated-adapters"
    ),
    on: Annotated[str, typer.Option(help="`validation` or `test`.")] = "test",
    rows: Annotated[int, typer.Option(help="Examples of each task.", min=4)] = 30,
    seeds: Annotated[int, typer.Option(help="Generator seeds.", min=1)] = 3,
    literal: Annotated[
        bool,
        typer.Option(
            "--literal/--no-literal", help="SG-LoRA and ICM-LoRA as published, too; minutes."
        ),
    ] = False,
    served: Annotated[
        bool,
        typer.Option(
            "--served/--teacher-forced",
            help="Decode through the serving engine, or score in one forward, faster.",
        ),
    ] = True,
    kept: Annotated[
        Path | None,
        typer.Option(help="Keep scores in this file, and go on from what it holds."),
    ] = None,
    base: _Base = None,
    shipped: _Shipped = None,
    zoo_folder: _Zoo = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Score every arm on held-out tasks and write the evidence."""
    import contextlib
    import json

    import torch
    from rich import print as show
    from transformers import AutoTokenizer

    from loraplex_generation.bundle import Bundle
    from loraplex_generation.evaluation import evaluate as run
    from loraplex_generation.evidence import write_evidence
    from loraplex_generation.frozen_base import FrozenBase
    from loraplex_generation.literal import LiteralRecipes
    from loraplex_generation.packing import ChatCodec
    from loraplex_generation.results import best_method
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.taskdata import TaskData
    from loraplex_server.adapters.served_scorer import served_scorer
    from loraplex_server.model.pull import loraplex_home, resolve_encoder, resolve_model

    directory = resolve_model(base)
    folder = shipped or shipped_folder()
    oracles, multi_task = _rivals(zoo_folder or loraplex_home() / "zoo", folder)
    codec = ChatCodec(AutoTokenizer.from_pretrained(directory))
    with contextlib.ExitStack() as running:
        scorer = None
        if served:
            layout = Bundle.load(folder).layout
            scorer = running.enter_context(
                served_scorer(directory, codec, layout, n_threads=threads)
            )
        torch.set_num_threads(threads)
        result: Evaluation = run(
            folder,
            FrozenBase(directory),
            TaskData(codec),
            SentenceEncoder(resolve_encoder()),
            sets=("h1", "h2", "h3") if on == "test" else ("validation",),
            oracles=oracles,
            multi_task=multi_task,
            n_rows=rows,
            n_seeds=seeds,
            literal=LiteralRecipes() if literal else None,
            scorer=scorer,
            kept=kept,
            report=lambda line: show(line, flush=True),
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{on}.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    write_evidence(result, out, on)
    if on == "validation":
        show(f"best on validation: {best_method(result, _CANDIDATES)}")
    show(f"wrote {out}")


def _rivals(zoo_folder: Path, shipped: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    from loraplex_generation.zoo_training import ZooTraining

    zoo = ZooTraining(zoo_folder, shipped)
    return {name: e.mean for name, e in zoo.oracles().items()}, zoo.multi_task()
