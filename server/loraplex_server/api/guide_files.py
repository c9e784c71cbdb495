"""Where the documentation lies that `make docs` builds, and which paths are its own."""

from __future__ import annotations

from pathlib import Path

__all__ = ["GUIDE", "is_guide"]

GUIDE = Path(__file__).parents[1] / "guide"  # of the package, so that the wheel has it


def is_guide(path: str) -> bool:
    """Whether a request's path is one of the guide's."""
    return path == "/guide" or path.startswith("/guide/")
