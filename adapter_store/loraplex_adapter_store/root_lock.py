"""One process at a time owns the directory of a store."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

from .errors import StoreError

__all__ = ["own_root"]


def own_root(root: Path) -> Callable[[], None]:
    """Takes the lock of the directory; returns what gives it back. Raises StoreError."""
    file = (root / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"{root} is in use by a running server: `loraplex adapters` talks to it; a second "
            "server needs another --state-dir"
        ) from None
    return file.close
