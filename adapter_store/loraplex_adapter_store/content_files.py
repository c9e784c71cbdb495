"""Content-addressed files: ``contents/ab/<digest>/`` with config, weights, chat template and plan.

A content is staged under ``staging/``, flushed, and renamed into place whole; it is never changed
afterwards. Whatever is staged when the process dies is swept at the next start.
"""

from __future__ import annotations

import filecmp
import logging
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from .digest_folder import DigestFolder
from .disk import Disk
from .faults import FaultLog, NoFaultLog

__all__ = ["CHAT_TEMPLATE_FILE", "CONFIG_FILE", "PLAN_FILE", "WEIGHTS_FILE", "ContentFiles"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
PLAN_FILE = "plan.bin"
_log = logging.getLogger(__name__)


class ContentFiles:
    """The callers serialise ``publish`` and ``remove`` of one digest."""

    def __init__(self, root: Path, disk: Disk, faults: FaultLog = NoFaultLog()) -> None:  # noqa: B008
        self._disk = disk
        self._faults = faults
        self._contents = DigestFolder(root / "contents", disk)
        self._staging = root / "staging"
        disk.make_directory(self._staging)
        disk.sweep(self._staging)

    def stage(self) -> Path:
        """A new empty directory on the same filesystem."""
        path = self._staging / uuid.uuid4().hex
        self._disk.make_directory(path)
        return path

    def write(self, path: Path, chunks: Iterable[bytes]) -> int:
        return self._disk.write(path, chunks)

    def n_bytes(self, folder: Path) -> int:
        return sum(entry.stat().st_size for entry in folder.iterdir())

    def discard(self, staged: Path) -> None:
        """What cannot be deleted goes with the sweep of the next start: no reason to fail."""
        try:
            if staged.exists():
                self._disk.remove(staged, self._staging / uuid.uuid4().hex)
        except OSError as error:
            self._faults.failed("storage", error)
            _log.warning("a staged adapter cannot be deleted: %s", error)

    def publish(self, staged: Path, digest: str) -> int:
        """Returns the bytes on disk. A content that is there already is kept, not replaced.

        Its plan is, if it is folded otherwise by now.
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
        """Returns the bytes freed; 0 if the content is not there."""
        path = self.path(digest)
        if not path.exists():
            return 0
        return self._disk.remove(path, self._staging / uuid.uuid4().hex)

    def path(self, digest: str) -> Path:
        return self._contents.path(digest)

    def digests(self) -> Iterator[str]:
        return self._contents.digests()
