"""The `loraplex` command: one file per subcommand, heavy imports inside the functions."""

from typing import Annotated

import typer

from .adapters import adapters
from .bench import bench
from .chat import chat
from .cluster import cluster
from .doctor import doctor, say_version
from .eval import evaluate
from .generate import generate
from .generator import generator
from .pull import pull
from .serve import ServeCommand, serve
from .train import train

app = typer.Typer(
    name="loraplex",
    help="Serve one base model with many adapters, mixed freely in one batch.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

app.command()(pull)
app.command()(chat)
app.command()(train)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(doctor)
app.command(cls=ServeCommand)(serve)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
app.add_typer(adapters, name="adapters")
app.add_typer(cluster, name="cluster")
app.add_typer(generator, name="generator")


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=say_version),
    ] = False,
) -> None:
    """Serve one base model with many adapters, mixed freely in one batch."""


def main() -> None:
    app()


if __name__ == "__main__":
    main()
