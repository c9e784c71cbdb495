"""The folders of the console and of the guide, and the paths that serve them."""

from pathlib import Path

CONSOLE = Path(__file__).parents[1] / "console"
GUIDE = Path(__file__).parents[1] / "guide"  # built by `make docs` into the package


def is_console(path: str) -> bool:
    """Return True for a request's path of the console."""
    return path == "/" or path.startswith("/console/")


def is_guide(path: str) -> bool:
    """Return True for a request's path of the guide."""
    return path == "/guide" or path.startswith("/guide/")
