"""`loraplex zoo`: the tasks, adapters and oracles that the generator learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .local_models import local_models
from .task_sets import split_named

if TYPE_CHECKING:
    from loraplex_generation.zoo_training import ZooTraining

__all__ = ["zoo"]

zoo = typer.Typer(help="Train the library of small task adapters that adapters are generated from.")

_Base = Annotated[str | None, typer.Option(help="Base model; default: the pulled one.")]
_Folder = Annotated[
    Path | None, typer.Option(help="State of the run. Default: $LORAPLEX_HOME/zoo.")
]
_Shipped = Annotated[
    Path | None, typer.Option(help="Where the library is exported. Default: the package itself.")
]
_Tasks = Annotated[
    str,
    typer.Option(
        help="The tasks: `shipped` (72 to train on), `wide` (520) or `small` (12). "
        "For the last two give --folder and --shipped."
    ),
]


@zoo.command()
def train(
    context: typer.Context,
    base: _Base = None,
    folder: _Folder = None,
    shipped: _Shipped = None,
    tasks: _Tasks = "shipped",
    resume: Annotated[
        bool,
        typer.Option("--resume/--restart", help="Go on from what is there, or train all anew."),
    ] = True,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="joint, oracles, multi-task or experts; repeat. Default: all in turn."),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train the library, then the oracles of held-out tasks. Kill it at any time; it goes on."""
    import torch
    from rich import print as show
    from transformers import AutoTokenizer

    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.zoo_training import STAGES

    torch.set_num_threads(threads)
    models = local_models(context)
    training = _training(models.loraplex_home(), folder, shipped, tasks)
    directory = models.resolve_model(base)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    training.run(
        directory,
        SentenceEncoder(models.resolve_encoder()),
        tokenizer,
        report=lambda line: show(line, flush=True),
        stages=stage or STAGES,
        restart=not resume,
    )


@zoo.command()
def status(
    context: typer.Context,
    folder: _Folder = None,
    shipped: _Shipped = None,
    tasks: _Tasks = "shipped",
) -> None:
    """What is trained so far."""
    from rich import print as show

    now = _training(local_models(context).loraplex_home(), folder, shipped, tasks).status()
    show(f"joint stage      {now.joint_step} of {now.joint_steps} steps")
    show(f"experts          {now.n_experts} of {now.n_train} tasks")
    show(f"oracles          {now.n_oracles} of {now.n_held_out} held-out tasks")
    if not now.complete:
        show("go on with       loraplex zoo train --resume")


@zoo.command()
def export(
    context: typer.Context,
    base: _Base = None,
    folder: _Folder = None,
    shipped: _Shipped = None,
    tasks: _Tasks = "shipped",
) -> None:
    """Write what is trained so far as the shipped library, whole or partial."""
    from rich import print as show
    from transformers import AutoTokenizer

    from loraplex_generation.sentences import SentenceEncoder

    models = local_models(context)
    directory = models.resolve_model(base)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    path = _training(models.loraplex_home(), folder, shipped, tasks).export(
        directory,
        SentenceEncoder(models.resolve_encoder()),
        tokenizer,
        report=lambda line: show(line, flush=True),
    )
    for file in sorted(path.parent.glob("*.safetensors")):
        show(f"{file.name}  {file.stat().st_size / 1e6:.1f} MB")


def _training(home: Path, folder: Path | None, shipped: Path | None, tasks: str) -> ZooTraining:
    """Refuses to mix the files of two sets of tasks."""
    from loraplex_generation.shipped import shipped_folder
    from loraplex_generation.zoo_training import ZooTraining

    split = split_named(tasks)
    if tasks != "shipped" and (folder is None or shipped is None):
        raise typer.BadParameter(f"--tasks {tasks} needs --folder and --shipped of its own")
    return ZooTraining(folder or home / "zoo", shipped or shipped_folder(), split=split)
