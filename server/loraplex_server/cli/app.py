"""The `loraplex` command: one file per subcommand, heavy imports inside the functions."""

from __future__ import annotations

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="loraplex",
    help="Serve one base model with many adapters, mixed freely in one batch.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    app()
