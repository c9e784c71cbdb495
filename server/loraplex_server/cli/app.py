"""The `loraplex` command: one file per subcommand, heavy imports inside the functions."""

from __future__ import annotations

import typer

from loraplex_generation.cli.generator import generator
from loraplex_generation.cli.zoo import zoo
from loraplex_server.model import pull as local_models

from .adapters import adapters
from .bench import bench
from .chat import chat
from .cluster import cluster
from .generate import generate
from .pull import pull
from .serve import serve
from .train import train, train_demos

__all__ = ["app", "main"]

app = typer.Typer(
    name="loraplex",
    help="Serve one base model with many adapters, mixed freely in one batch.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

app.command()(pull)
app.command()(chat)
app.command()(train)
app.command(name="train-demos")(train_demos)
app.command()(generate)
app.add_typer(zoo, name="zoo")
app.add_typer(generator, name="generator")
app.command()(serve)
app.command()(bench)
app.add_typer(adapters, name="adapters")
app.add_typer(cluster, name="cluster")


@app.callback()
def root(context: typer.Context) -> None:
    """Serve one base model with many adapters, mixed freely in one batch."""
    context.obj = local_models


def main() -> None:
    app()


if __name__ == "__main__":
    main()
