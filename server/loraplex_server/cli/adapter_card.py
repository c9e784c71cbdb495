"""Prints the card of an adapter of a running server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .adapter_client import AdapterClient


@contextlib.contextmanager
def open_server(url: str | None, api_key: str | None) -> Iterator[AdapterClient]:
    """Open a client of the server. An error inside the block ends the command."""
    from .adapter_client import AdapterClient, find_server
    from .server_client import errors_in_red

    with errors_in_red():
        yield AdapterClient(find_server(url), api_key)


def show_card(name: str, url: str | None, api_key: str | None, *, as_json: bool) -> None:
    """Print the card of a server's adapter."""
    from .adapter_client import FULL

    with open_server(url, api_key) as server:
        card = server.call("GET", name, params=FULL)
    echo_card(card, as_json=as_json)


def echo_card(card: dict[str, Any], *, as_json: bool) -> None:
    """Print a card with its load report."""
    if as_json:
        typer.echo(json.dumps(card, indent=2))
        return
    report = card["report"]
    ratios = [m["delta_ratio"] for m in report["modules"].values() if m["delta_ratio"] is not None]
    lines = {
        "name": f"{card['name']} (revision {card['revision']})",
        "digest": card["digest"],
        "family": f"{card['family']}, ranks {', '.join(map(str, card['ranks'])) or 'none'}",
        "scale": report["scale_rule"],
        "tensors": f"{report['n_matched']} matched, {len(report['unexpected_keys'])} unexpected",
        "modules": f"{len(report['modules'])}",
        "‖ΔW‖/‖W‖": f"{min(ratios):.4f} … {max(ratios):.4f}" if ratios else "–",
        "bytes": ", ".join(f"{tier} {size_text(n)}" for tier, n in card["n_bytes"].items() if n),
        "description": card["description"] or "–",
    }
    for key, value in lines.items():
        typer.echo(f"{key:12} {value}")
    for note in report["notes"]:
        typer.echo(f"note         {note}")
    for warning in report["warnings"]:
        typer.secho(f"warning      {warning}", fg="yellow")


def size_text(n_bytes: int) -> str:
    """Return a number of bytes as people read it."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
