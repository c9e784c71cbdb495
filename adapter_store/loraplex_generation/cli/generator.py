"""`loraplex generator`: train the maps from a description to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .local_models import local_models
from .task_sets import split_named

__all__ = ["generator"]

generator = typer.Typer(help="Train the generators of adapters from descriptions.")

_Base = Annotated[str | None, typer.Option(help="Base model; default: the pulled one.")]
_Shipped = Annotated[
    Path | None, typer.Option(help="Folder of the library. Default: the package itself.")
]


@generator.command()
def train(
    context: typer.Context,
    shipped: _Shipped = None,
    seed: Annotated[int, typer.Option(help="Seed of every map.")] = 0,
    default: Annotated[
        str, typer.Option(help="The method that `auto` stands for where there is no text map.")
    ] = "end-to-end",
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

    def say(line: str) -> None:
        show(line, flush=True)

    torch.set_num_threads(threads)
    models = local_models(context)
    folder = shipped or shipped_folder()
    conditions = None
    if icm:
        tasks = [Task.parse(name) for name in Library.load(folder / LIBRARY_FILE).tasks]
        reader = TaskVectors.of_directory(models.resolve_model(base))
        conditions = train_conditions(reader, tasks, say)
    bundle = train_bundle(
        folder,
        SentenceEncoder(models.resolve_encoder()),
        seed=seed,
        default=default,
        conditions=conditions,
        report=say,
    )
    path = bundle.save(folder)
    show(f"{path.name}  {path.stat().st_size / 1e6:.1f} MB")
    _tell_of_text_map(folder)


@generator.command("text-map")
def text_map(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Option(help="State of the run. Default: $LORAPLEX_HOME/text-map.")
    ] = None,
    shipped: _Shipped = None,
    tasks: Annotated[
        str, typer.Option(help="The tasks: `wide` (520), `shipped` (72) or `small` (12).")
    ] = "wide",
    steps: Annotated[int | None, typer.Option(help="Default: 2200.", min=1)] = None,
    base: _Base = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train the map from texts to adapters; an hour or two. Kill it at any time; it goes on.

    It starts beside the map that the folder has of the same tasks and base, or from the library's
    joint vectors. `auto` then stands for it.
    """
    import torch
    from rich import print as show
    from transformers import AutoTokenizer

    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.text_map_training import TextMapRecipe, train_text_map

    split = split_named(tasks)
    torch.set_num_threads(threads)
    models = local_models(context)
    directory = models.resolve_model(base)
    recipe = TextMapRecipe() if steps is None else TextMapRecipe(n_steps=steps)
    path = train_text_map(
        directory,
        SentenceEncoder(models.resolve_encoder()),
        AutoTokenizer.from_pretrained(directory),
        split,
        folder=folder or models.loraplex_home() / "text-map",
        shipped=shipped or shipped_folder(),
        recipe=recipe,
        report=lambda line: show(line, flush=True),
    )
    show(f"{path.name}  {path.stat().st_size / 1e6:.1f} MB")


@generator.command()
def reader(
    context: typer.Context,
    shipped: _Shipped = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train the text map's reading of descriptions anew; what each operation does stays."""
    import torch
    from rich import print as show

    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.text_map import TextMap
    from loraplex_generation.text_map_training import refit_reader

    torch.set_num_threads(threads)
    encoder = SentenceEncoder(local_models(context).resolve_encoder())
    path = refit_reader(
        shipped or shipped_folder(), encoder, report=lambda line: show(line, flush=True)
    )
    show(f"{path.name}  limit {TextMap.load(path).reader.limit:.3f}")


@generator.command()
def guard(context: typer.Context, shipped: _Shipped = None) -> None:
    """Fit the check that refuses unknown descriptions anew; the methods stay as they are."""
    from rich import print as show

    from loraplex_generation.bundle import Bundle
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.training import refit_guard

    folder = shipped or shipped_folder()
    path = refit_guard(folder, SentenceEncoder(local_models(context).resolve_encoder()))
    show(f"{path.name}  limit {Bundle.load(folder).ood_score.limit:.3f}")


@generator.command()
def default(
    method: Annotated[
        str, typer.Argument(help="What `auto` shall stand for where there is no text map.")
    ],
    shipped: _Shipped = None,
) -> None:
    """Set what `auto` means, as `server/benchmarks/eval_generator.py --on validation` advises."""
    from loraplex_generation.bundle import Bundle
    from loraplex_generation.service import METHODS
    from loraplex_generation.shipped import shipped_folder

    if method not in METHODS:
        raise typer.BadParameter(f"known methods: {', '.join(METHODS)}")
    folder = shipped or shipped_folder()
    bundle = Bundle.load(folder)
    bundle.default = method
    bundle.save(folder)
    _tell_of_text_map(folder)


def _tell_of_text_map(folder: Path) -> None:
    from loraplex_generation.text_map import TEXT_MAP_FILE

    if (folder / TEXT_MAP_FILE).is_file():
        typer.echo(f"`auto` stays the text map: {TEXT_MAP_FILE} is there, and goes first")
