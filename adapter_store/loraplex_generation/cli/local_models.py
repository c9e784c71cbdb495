"""Where the base models and the sentence encoder are; the `loraplex` command knows."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import typer

__all__ = ["LocalModels", "local_models"]


class LocalModels(Protocol):
    """Methods read no network; they raise an error that names the command which fetches a model."""

    def resolve_model(self, spec: str | None = None) -> Path:
        """The transformers directory of a base; None: the default one."""

    def resolve_encoder(self) -> Path: ...

    def loraplex_home(self) -> Path:
        """The folder of all that is cached."""


def local_models(context: typer.Context) -> LocalModels:
    """The object of the root command."""
    models: LocalModels = context.find_root().obj
    return models
