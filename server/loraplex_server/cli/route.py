"""`loraplex route`: ask the semantic router, or measure it on the shipped adapters."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["route"]

route = typer.Typer(
    name="route", help="Semantic choice of adapters (adapter: auto).", no_args_is_help=True
)


@route.command("eval")
def evaluate(
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of adapters with cards. Default: the shipped ones."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Held-out prompts of each adapter.", min=1)] = 40,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write auto.json and auto.png (needs matplotlib) here."),
    ] = None,
) -> None:
    """Right, abstained and false picks on prompts nobody has seen, and the latency of a choice."""
    from loraplex_server.adapters import routing_evaluation as evaluation
    from loraplex_server.adapters.semantic_router import SemanticRouter
    from loraplex_server.adapters.sentence_encoder import MiniLmEncoder
    from loraplex_server.model.errors import ModelError
    from loraplex_server.model.pull import resolve_encoder

    try:
        encoder = resolve_encoder()
    except ModelError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    with as_file(files("loraplex_adapter_store") / "demos") as shipped:
        profiles = evaluation.shipped_profiles(adapters or Path(shipped))
    known = [p for p in profiles if evaluation.held_out_prompts(p.name, 1)]
    if not known:
        typer.echo(f"no adapter with held-out prompts below {adapters or 'the package'}", err=True)
        raise typer.Exit(1)
    router = SemanticRouter(lambda: MiniLmEncoder(encoder), lambda: profiles)
    try:
        result = evaluation.evaluate(router, [p.name for p in known], n=n)
    finally:
        router.close()
    _print(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "auto.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
        evaluation.plot(result, out / "auto.png")


def _print(result: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from loraplex_server.adapters.routing_evaluation import BASE, Evaluation

    assert isinstance(result, Evaluation)
    table = Table("asked for", "prompts", "right", "left to the base", "elsewhere", box=None)
    for asked, row in result.confusion.items():
        total, right, left = sum(row.values()), row.get(asked, 0), row.get(BASE, 0)
        others = ", ".join(f"{k} {v}" for k, v in row.items() if k not in (asked, BASE))
        shown_left = "" if asked == BASE else str(left)
        table.add_row(asked, str(total), f"{right / total:.0%}", shown_left, others)
    console = Console()
    console.print(table)
    console.print(
        f"right {result.right:.1%}, left to the base {result.abstained:.1%}, "
        f"false picks {result.false_picks:.1%}; "
        f"p50 {result.latency_ms['p50']:.1f} ms, p95 {result.latency_ms['p95']:.1f} ms"
    )
