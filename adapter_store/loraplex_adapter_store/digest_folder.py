"""A directory whose entries are named by digest: ``ab/<digest>``, so that none grows too long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .disk import Disk

__all__ = ["DigestFolder"]


class DigestFolder:
    """Stateless after it has made ``root``; entries are files or directories."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._root = root
        disk.make_directory(root)

    def path(self, digest: str) -> Path:
        return self._root / digest[:2] / digest

    def digests(self) -> Iterator[str]:
        for group in self._root.iterdir():
            yield from (entry.name for entry in group.iterdir())
