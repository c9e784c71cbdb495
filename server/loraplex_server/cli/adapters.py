"""`loraplex adapters`: the adapters of a running server, and adapter files on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer

from .adapter_card import echo_card, open_server, show_card, size_text
from .adapter_files import convert, inspect
from .complete import complete_adapter
from .verify import verify

_WIDE = 110  # columns of a terminal that can show digests, too
_LEAST_DESCRIPTION = 8

adapters = typer.Typer(
    name="adapters", help="List, add, inspect and remove adapters.", no_args_is_help=True
)
adapters.command()(convert)
adapters.command()(inspect)
adapters.command()(verify)

Url = Annotated[
    str | None,
    typer.Option(
        help="URL of a server, such as http://127.0.0.1:8000. Default: the server that runs on "
        "this machine.",
        envvar="LORAPLEX_URL",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(help="API key of the server.", envvar="LORAPLEX_API_KEY", show_default=False),
]
Name = Annotated[str, typer.Argument(help="Name of the adapter.", autocompletion=complete_adapter)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@adapters.command("list")
def list_adapters(url: Url = None, api_key: Key = None, as_json: AsJson = False) -> None:
    """List all adapters, one per line."""
    with open_server(url, api_key) as server:
        answer = server.call("GET")
    cards = answer["data"]
    if as_json:
        typer.echo(json.dumps(cards, indent=2))
        return
    from rich.console import Console

    for line in _listing(cards, Console().width):
        typer.echo(line)
    for folder in answer.get("refused", ()):  # older servers do not say
        typer.secho(f"refused: {folder['name']}: {folder['reason']}", fg="yellow", err=True)


@adapters.command()
def show(name: Name, url: Url = None, api_key: Key = None, as_json: AsJson = False) -> None:
    """Show one adapter with its load report."""
    show_card(name, url, api_key, as_json=as_json)


@adapters.command()
def add(
    name: Annotated[str, typer.Argument(help="Name that requests use for the adapter.")],
    source: Annotated[
        str,
        typer.Argument(
            help="Folder on this machine, or an address that the server may load from: "
            "hf://org/repo/sub@rev, s3://, gs://, az:// or https://."
        ),
    ],
    description: Annotated[
        str | None, typer.Option(help="Short text on what the adapter is good at.")
    ] = None,
    example: Annotated[
        list[str] | None, typer.Option(help="Example prompt for the adapter. Can be repeated.")
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace/--no-replace", help="Replace the adapter if the name exists."),
    ] = True,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter and store it. An adapter that could only be served in part is refused."""
    with open_server(url, api_key) as server:
        card = server.add(name, source, description, example or [], replace=replace)
    echo_card(card, as_json=as_json)


@adapters.command("rm")
def remove(name: Name, url: Url = None, api_key: Key = None) -> None:
    """Remove a name once its running requests have ended, and print the bytes that were freed."""
    with open_server(url, api_key) as server:
        source = server.call("GET", name)["provenance"].get("source")
        report = server.call("DELETE", name)
    freed = ", ".join(f"{tier} {size_text(n)}" for tier, n in report["n_bytes_freed"].items())
    typer.echo(f"removed {name} (freed: {freed})")
    if source == "directory":
        typer.echo("Its folder stays: if --adapters-dir has it, the next start serves it again.")


@adapters.command()
def unload(name: Name, url: Url = None, api_key: Key = None) -> None:
    """Free the memory of an idle adapter. Its next request loads it again."""
    with open_server(url, api_key) as server:
        card = server.call("POST", f"{name}/unload")
    typer.echo(f"{name} is on {card['tier']}; its next request loads it again")


@adapters.command()
def revisions(name: Name, url: Url = None, api_key: Key = None, as_json: AsJson = False) -> None:
    """List the stored contents of a name, the current one first."""
    with open_server(url, api_key) as server:
        contents = server.call("GET", f"{name}/revisions")["data"]
    if as_json:
        typer.echo(json.dumps(contents, indent=2))
        return
    for revision in contents:
        mark = "current" if revision is contents[0] else ""
        when = datetime.fromtimestamp(revision["created"]).isoformat(" ", "seconds")
        typer.echo(f"{revision['revision']:5}  {revision['digest'][:12]}  {when}  {mark}".rstrip())


@adapters.command()
def rollback(
    name: Name,
    digest: Annotated[
        str | None,
        typer.Option(
            help="First characters of the digest to restore. Default: the previous content."
        ),
    ] = None,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """Make an older content of a name the current one. Running requests keep theirs."""
    with open_server(url, api_key) as server:
        query = {} if digest is None else {"digest": digest}
        card = server.call("POST", f"{name}/rollback", params=query)
    typer.echo(f"{name} is {card['digest'][:12]} again (revision {card['revision']})")


def _listing(cards: Sequence[dict[str, Any]], width: int) -> list[str]:
    """Return the lines of a table that fits ``width``: whole names, shortened descriptions."""
    titles = ("name", "family", "ranks", "disk", "tier", "rev", "digest")
    rows: list[tuple[str, ...]] = [titles]
    for card in cards:
        rows.append(
            (
                card["name"],
                card["family"],
                _ranks(card["ranks"]),
                size_text(card["n_bytes"]["disk"]),
                card["tier"] or "–",  # hidden for adapters that the operator shares
                str(card["revision"]),
                card["digest"][:12],
            )
        )
    if width < _WIDE:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width - sum(widths) - 2 * len(widths)
    descriptions = ["description", *(card["description"] or "" for card in cards)]
    lines = []
    for row, description in zip(rows, descriptions, strict=True):
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
        if room >= _LEAST_DESCRIPTION:
            short = description if len(description) <= room else f"{description[: room - 1]}…"
            cells.append(short)
        lines.append("  ".join(cells).rstrip())
    return lines


def _ranks(ranks: list[int]) -> str:
    """Return "8", or the smallest and the largest of more than two ranks."""
    return ",".join(map(str, ranks)) if len(ranks) <= 2 else f"{ranks[0]}–{ranks[-1]}"
