"""The part of `loraplex train` that learns classes of images on a CLIP."""

from __future__ import annotations

import typer

from loraplex_training.images.config import ImageTraining


def train_classes(config: ImageTraining, *, overwrite: bool) -> None:
    """Train, and print a line for each tenth of the run and the accuracy. Raises TrainingError."""
    from loraplex_training.images.few_shot import train_on_images  # takes seconds

    def on_step(step: int, loss: float) -> None:
        if step % max(1, config.steps // 10) == 0:
            typer.echo(f"{config.out}: step {step}/{config.steps}  loss {loss:.3f}", err=True)

    trained = train_on_images(config, on_step=on_step, overwrite=overwrite)
    typer.echo(
        f"{trained.folder}: {trained.n_parameters:,} parameters learnt {len(trained.labels)} "
        f"labels from {trained.n_images} images"
    )
    if trained.accuracy is not None:
        typer.echo(
            f"accuracy {trained.accuracy.tuned:.3f}; the base alone: "
            f"{trained.accuracy.zero_shot:.3f}"
        )
    name = config.name or config.out.resolve().name
    typer.echo(f"serve it: loraplex adapters add {name} {config.out}")
