"""`loraplex adapters verify`: the files of a server that is stopped, or that runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loraplex_adapter_store.verification import Findings


def verify(
    state_dir: Annotated[
        Path | None,
        typer.Argument(
            help="State directory of a server (`serve --state-dir`). Default: all directories in "
            "$LORAPLEX_HOME/adapters.",
            envvar="LORAPLEX_STATE_DIR",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Move damage to the folder damaged/ of the directory and delete left-overs. The "
            "server must be stopped.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every stored adapter against its digest, and every name against its files.

    Without --repair, nothing is changed. The exit status is 1 if damage remains.
    """
    from loraplex_adapter_store import verification
    from loraplex_adapter_store.errors import StoreError
    from loraplex_adapter_store.limits import StoreLimits
    from loraplex_server.model.loading.pull import loraplex_home

    from .server_client import errors_in_red

    is_damaged = False
    with errors_in_red():
        all_contents = sorted((loraplex_home() / "adapters").glob("*/contents"))
        folders = [state_dir] if state_dir else [contents.parent for contents in all_contents]
        if not folders:
            raise StoreError("no server has stored adapters here; name a STATE_DIR")
        for folder in folders:
            if repair:
                _print(folder, verification.repair(folder, StoreLimits()), "repaired", as_json)
            left = verification.verify(folder, StoreLimits())
            is_damaged |= left.is_damaged
            if not repair or left.problems:
                _print(folder, left, "--repair", as_json)
    raise typer.Exit(int(is_damaged))


def _print(folder: Path, found: "Findings", title: str, as_json: bool) -> None:
    if as_json:
        problems = [problem._asdict() for problem in found.problems]
        typer.echo(json.dumps({"state_dir": str(folder), "problems": problems}))
        return
    typer.echo(f"{folder}: {found.n_names} names, {found.n_contents} contents")
    if not found.problems:
        typer.echo("nothing is wrong")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "problem", title, box=None)
    for subject, text, fate, _ in found.problems:
        table.add_row(subject, text, fate)
    Console().print(table)
