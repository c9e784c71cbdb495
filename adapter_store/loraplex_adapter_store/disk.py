"""Every change the store makes to its directory goes through here, one named operation at a time.

Tests inject faults before the k-th operation; nothing else in the store writes files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Disk"]


class Disk:
    """Durable file operations. Stateless and thread-safe."""

    def before(self, operation: str, path: Path) -> None:
        """Called before each operation; does nothing. Fault injection overrides it."""

    def make_directory(self, path: Path) -> None:
        self.before("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview], *, flush: bool = True) -> int:
        """Creates ``path`` with the chunks, flushed to the device. Returns the bytes written."""
        self.before("create", path)
        n_bytes = 0
        with path.open("xb") as file:
            for chunk in chunks:
                self.before("write", path)
                file.write(chunk)
                n_bytes += len(chunk)
            if flush:
                file.flush()
                self.before("fsync", path)
                os.fsync(file.fileno())
        return n_bytes

    def publish(self, staged: Path, final: Path) -> None:
        """Makes a complete staged directory visible, all or nothing."""
        self.sync_directory(staged)
        self.make_directory(final.parent)
        self.before("rename", final)
        staged.rename(final)
        self.sync_directory(final.parent)

    def replace(self, staged: Path, final: Path) -> None:
        """Moves one file to where another may be."""
        self.before("rename", final)
        staged.replace(final)

    def unlink(self, path: Path) -> int:
        """Deletes one file. Returns the bytes freed; 0 if there is none."""
        if not path.exists():
            return 0
        n_bytes = path.stat().st_size
        self.before("unlink", path)
        path.unlink()
        return n_bytes

    def remove(self, path: Path, trash: Path) -> int:
        """Renames a directory away at once, then deletes it. Returns the bytes freed."""
        n_bytes = sum(entry.stat().st_size for entry in path.iterdir())
        self.before("rename", path)
        path.rename(trash)
        self.before("rmtree", trash)
        shutil.rmtree(trash)
        return n_bytes

    def sweep(self, directory: Path) -> None:
        """Deletes everything inside ``directory``: leftovers of a crash."""
        for entry in directory.iterdir():
            self.before("rmtree", entry)
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def sync_directory(self, path: Path) -> None:
        self.before("fsync", path)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
