"""The trained parts of the generator, for the default base."""

from pathlib import Path

__all__ = ["shipped_folder"]


def shipped_folder() -> Path:
    """Return the folder of these files."""
    return Path(__file__).parent
