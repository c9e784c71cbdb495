"""Train demo adapters anew: generate data, train, measure on held-out prompts.

    python -m research.demos [NAME]... [--out demos]

Demos that --out holds already are skipped; an interrupted run goes on where it was.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from loraplex_server.model.loading.pull import DEFAULT_BASE, loraplex_home, resolve_model
from loraplex_training.run import StepReport

from . import DEMOS
from .make import is_made, make_demo


def train_demos(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Default: all that ship with the server, but for chores and clock-12h, which "
            "learnt tasks of the zoo.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder per demo is written here.")] = (
        Path("demos")
    ),
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Train demo adapters anew: generate data, train, measure on held-out prompts."""
    unknown = [name for name in names or () if name not in DEMOS]
    if unknown:
        raise typer.BadParameter(f"no demo {', '.join(unknown)}; choose {', '.join(DEMOS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    for name in names or DEMOS:
        folder = out / name
        if is_made(folder):
            typer.echo(f"{name}: in {folder} already")
            continue
        measured = make_demo(
            DEMOS[name],
            folder,
            base=resolve_model(None),
            base_name=DEFAULT_BASE,
            work=loraplex_home() / "demo-data",
            on_step=_say,
        )
        typer.echo(
            f"{name}: {measured.adapter:.0%} of {measured.n_prompts} held-out prompts "
            f"(base {measured.base:.0%})"
        )


def _say(report: StepReport) -> None:
    if report.step % max(1, report.steps // 10) == 0:
        typer.echo(f"step {report.step}/{report.steps}  {report.tokens_per_s:.0f} tok/s", err=True)


if __name__ == "__main__":
    typer.run(train_demos)
