"""`loraplex adapters routing NAME`: which experts the rows of a routed adapter went to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from .complete import complete_adapter

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["heatmap", "routing"]

# From none to all: a cell says how many of a place's rows an expert took, 1/n being even.
_COLOURS = (236, 18, 25, 31, 37, 71, 107, 178, 208, 196)


def routing(
    name: Annotated[
        str, typer.Argument(help="Name of the adapter.", autocompletion=complete_adapter)
    ],
    url: Annotated[
        str, typer.Option(help="A running server.", envvar="LORAPLEX_URL")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(help="Its API key.", envvar="LORAPLEX_API_KEY", show_default=False)
    ] = None,
    window_s: Annotated[float, typer.Option("--window", help="Seconds to look back.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw the expert load of a routed adapter: one line a layer, one column an expert."""
    report = _fetch(name, url, api_key, window_s)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console(width=os.get_terminal_size().columns if os.isatty(1) else 120)
    if not report["n_picks"]:
        console.print(
            f"{report['name']} ({report['family']}): no rows were routed in the last {window_s:g} s"
        )
        return
    console.print(
        f"[bold]{report['name']}[/] ({report['family']}, {report['digest'][:12]}): "
        f"{report['n_picks']:,} picks in {report['window_s']:g} s, "
        f"entropy {report['entropy']:.3f}, imbalance {report['imbalance']:.2f}"
    )
    for line in heatmap(report["places"]):
        console.print(line)


def heatmap(places: Sequence[Mapping[str, Any]]) -> list[Text]:
    """A header, then one line for each place: shares in percent on a colour, entropy at the end."""
    from rich.text import Text

    n_experts = max(len(place["counts"]) for place in places)
    width = max(len(_short(place["place"])) for place in places)
    lines = [Text(" " * (width + 1) + "".join(f"{e:>4} " for e in range(n_experts)) + " entropy")]
    for place in places:
        line = Text(f"{_short(place['place']):<{width}} ")
        total = sum(place["counts"]) or 1
        for count in place["counts"]:
            share = count / total
            relative = min(1.0, share * len(place["counts"]) / 3)  # thrice the even share is hot
            colour = _COLOURS[round(relative * (len(_COLOURS) - 1))]
            line.append(f"{100 * share:>4.0f} ", style=f"white on color({colour})")
        line.append(f"  {place['entropy']:.3f}")
        lines.append(line)
    return lines


def _short(place: str) -> str:
    """ "model.layers.12.mlp" → "12 mlp"."""
    head, _, rest = place.partition("layers.")
    return rest.replace(".", " ", 1) if rest else head


def _fetch(name: str, url: str, api_key: str | None, window_s: float) -> dict[str, Any]:
    import httpx

    from .server_client import Refused, answer_of, server_client, server_root

    path = f"/v1/adapters/{quote(name)}/routing"
    try:
        with server_client(url, api_key, timeout=30.0) as client:
            return answer_of(client.get(path, params={"window_s": window_s}))
    except Refused as error:
        message = str(error)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        message = f"cannot reach {server_root(url)}: {error}"
    typer.echo(message, err=True)
    raise typer.Exit(1)
