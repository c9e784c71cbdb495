"""The library and generators for the default base, as trained by `loraplex zoo` and `generator`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["shipped_folder"]


def shipped_folder() -> Path:
    """Where the files of this package lie."""
    return Path(__file__).parent
