"""The error line that every command ends with."""

import typer


def failed(error: Exception | str) -> typer.Exit:
    """Print the error as one red line. Return the exit that the caller raises."""
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(1)
