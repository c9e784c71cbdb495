"""Content-addressed files: ``contents/ab/<digest>/`` with config, weights, chat template and plan.

A content is written to ``staging/``, flushed, and renamed into place whole. It never changes
afterwards. The next start sweeps what a killed process left in ``staging/``.

``Disk`` has all changes that the store makes to its directory, as named operations. Tests inject
faults before the k-th operation. Nothing else in the store writes files.
"""

import fcntl
import filecmp
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapter_store.errors import StoreError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PLAN_FILE = "plan.bin"
_log = logging.getLogger(__name__)


class Disk:
    """Durable file operations. Stateless and thread-safe."""

    def before(self, operation: str, path: Path) -> None:
        """Runs before each operation and does nothing. Fault injection overrides it."""

    def make_directory(self, path: Path) -> None:
        self.before("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview], *, flush: bool = True) -> int:
        """Create ``path`` with the chunks, flushed to the device. Returns the written bytes."""
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

    def link(self, path: Path, target: Path) -> None:
        """Give the file ``path`` a second name, with its bytes flushed to the device."""
        self.before("create", target)
        target.hardlink_to(path)
        with target.open("rb") as file:
            self.before("fsync", target)
            os.fsync(file.fileno())

    def publish(self, staged: Path, final: Path) -> None:
        """Rename a complete staged directory into place, atomically."""
        self.sync_directory(staged)
        self.make_directory(final.parent)
        self.before("rename", final)
        staged.rename(final)
        self.sync_directory(final.parent)

    def replace(self, staged: Path, final: Path) -> None:
        """Move one file, in place of another if there is one."""
        self.before("rename", final)
        staged.replace(final)

    def unlink(self, path: Path) -> int:
        """Delete one file. Returns the freed bytes; 0 if there is no file."""
        if not path.exists():
            return 0
        n_bytes = path.stat().st_size
        self.before("unlink", path)
        path.unlink()
        return n_bytes

    def remove(self, path: Path, trash: Path) -> int:
        """Rename a directory to ``trash``, then delete it. Returns the freed bytes."""
        n_bytes = sum(entry.stat().st_size for entry in path.iterdir())
        self.before("rename", path)
        path.rename(trash)
        self.before("rmtree", trash)
        shutil.rmtree(trash)
        return n_bytes

    def sweep(self, directory: Path) -> None:
        """Delete everything inside ``directory``."""
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


class DigestFolder:
    """A directory of files or directories named by digest, in groups: ``ab/<digest>``."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._root = root
        disk.make_directory(root)

    def path(self, digest: str) -> Path:
        return self._root / digest[:2] / digest

    def digests(self) -> Iterator[str]:
        for group in self._root.iterdir():
            yield from (entry.name for entry in group.iterdir())


def lock_directory(root: Path) -> Callable[[], None]:
    """Lock a store's directory and return the function that unlocks it. Raises StoreError."""
    file = (root / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"{root} is in use by a running server: stop the server, or talk to it with `loraplex "
            "adapters`; a second server needs another --state-dir"
        ) from None
    return file.close


def is_locked(root: Path) -> bool:
    """Return True if a process has the store open."""
    try:
        with (root / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class ContentFiles:
    """The callers serialise ``publish`` and ``remove`` of one digest."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._disk = disk
        self._contents = DigestFolder(root / "contents", disk)
        self._staging = root / "staging"
        disk.make_directory(self._staging)
        disk.sweep(self._staging)

    def stage(self) -> Path:
        """Create an empty directory on the same filesystem."""
        path = self._staging / uuid.uuid4().hex
        self._disk.make_directory(path)
        return path

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """Yield a folder of ``stage``, and ``discard`` it at the end."""
        staged = self.stage()
        try:
            yield staged
        finally:
            self.discard(staged)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> int:
        return self._disk.write(path, chunks)

    def link(self, path: Path, target: Path) -> None:
        self._disk.link(path, target)

    def n_bytes(self, folder: Path) -> int:
        return sum(entry.stat().st_size for entry in folder.iterdir())

    def discard(self, staged: Path) -> None:
        """Delete a staged directory. If that fails, the next start sweeps it."""
        try:
            if staged.exists():
                self._disk.remove(staged, self._staging / uuid.uuid4().hex)
        except OSError as error:
            _log.error("a staged adapter cannot be deleted: %s", error, extra={"part": "storage"})

    def publish(self, staged: Path, digest: str) -> int:
        """Move a staged content into place and return its bytes on disk.

        An existing content is kept; only its plan is replaced if it differs.
        """
        final = self.path(digest)
        if final.exists():
            old, new = final / PLAN_FILE, staged / PLAN_FILE
            if new.exists() and not (old.exists() and filecmp.cmp(old, new, shallow=False)):
                self._disk.replace(new, old)
            self.discard(staged)
        else:
            self._disk.publish(staged, final)
        return self.n_bytes(final)

    def remove(self, digest: str) -> int:
        """Return the freed bytes; 0 if there is no such content."""
        path = self.path(digest)
        if not path.exists():
            return 0
        return self._disk.remove(path, self._staging / uuid.uuid4().hex)

    def path(self, digest: str) -> Path:
        return self._contents.path(digest)

    def digests(self) -> Iterator[str]:
        return self._contents.digests()
