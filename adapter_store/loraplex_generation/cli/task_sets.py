"""`--tasks` of the commands that train on many tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from loraplex_generation.zoo.split import ZooSplit

__all__ = ["split_named"]


def split_named(tasks: str) -> ZooSplit:
    """The split of these tasks. Raises BadParameter, which names the known sets."""
    from loraplex_generation.zoo.split import SPLIT_FILES, load_split

    if tasks not in SPLIT_FILES:
        raise typer.BadParameter(f"known sets of tasks: {', '.join(SPLIT_FILES)}")
    return load_split(tasks)
