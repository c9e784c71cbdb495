"""Pages of the prefix cache in files: ``FOLDER/<identity>/<key>.kv``, readable by their user only.

A file is [magic | key | sha256 of the page | page]. The identity names everything that a page's
numbers depend on besides its key: the base's files, the dtype and shape of the cache, and the
version. Files of other identities count towards the limit and are never read.
"""

import contextlib
import hashlib
import logging
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path

_MAGIC = b"loraplex-kv-1\n"
_HEADER_BYTES = len(_MAGIC) + 16 + 32
_SUFFIX = ".kv"
_log = logging.getLogger(__name__)


class PageFiles:
    """Owner of the files. Safe from any thread. A file that cannot be read is a page less."""

    def __init__(self, folder: Path, identity: str, *, page_bytes: int, max_bytes: int) -> None:
        """Finds the files that are there. Raises ValueError if others may write to the folder."""
        self._folder, self._page_bytes, self._max_bytes = folder, page_bytes, max_bytes
        self._own = folder / identity
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # by path, least recently used first
        self._n_bytes = 0
        self._make_private()
        self._find_files()

    def has(self, key: bytes) -> bool:
        """Return True if there is a file of this page."""
        return self._path(key) in self._sizes

    def write(self, key: bytes, page: memoryview) -> None:
        """Write a page unless it has a file; delete the oldest files beyond the limit.

        A failure is logged, and the page has no file then.
        """
        path = self._path(key)
        if path in self._sizes:
            return
        staged = f"{path}.{os.getpid()}"
        try:
            with open(staged, "xb", opener=_private) as file:
                file.writelines((_MAGIC, key, hashlib.sha256(page).digest(), page))
            os.replace(staged, path)
        except OSError as error:
            _delete(staged)
            _log.warning("a page of the prefix cache was not written to %s: %s", path, error)
            return
        with self._lock:
            self._add(path, _HEADER_BYTES + len(page))
            surplus = self._take_surplus()
        for old in surplus:
            _delete(old)

    def read(self, key: bytes, into: memoryview) -> bool:
        """Read a page. Return False if its file is missing or damaged, and delete it then."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                head = file.read(_HEADER_BYTES)
                n_read = file.readinto(into)
                is_whole = n_read == self._page_bytes and not file.read(1)
            os.utime(path)  # the order of use, for the next start
        except OSError:
            is_whole = False
        if is_whole and head == _MAGIC + key + hashlib.sha256(into).digest():
            with self._lock:
                if path in self._sizes:
                    self._sizes.move_to_end(path)
            return True
        with self._lock:
            self._n_bytes -= self._sizes.pop(path, 0)
        _delete(path)
        return False

    @property
    def max_pages(self) -> int:
        """The number of pages within the limit."""
        return self._max_bytes // (self._page_bytes + _HEADER_BYTES)

    def _path(self, key: bytes) -> str:
        return f"{self._own}/{key.hex()}{_SUFFIX}"

    def _make_private(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own.mkdir(mode=0o700, exist_ok=True)
        found = self._own.lstat()
        is_private = found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if not (stat.S_ISDIR(found.st_mode) and is_private):
            raise ValueError(
                f"--prefix-cache-dir: other users may read or write {self._own}, and it would hold "
                "texts of requests; delete it, or name another folder"
            )

    def _find_files(self) -> None:
        found = []
        for path in self._folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another server deleted it
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, str(path), status.st_size))
        for _, name, n_bytes in sorted(found):
            self._add(name, n_bytes)
        for name in self._take_surplus():
            _delete(name)

    def _add(self, path: str, n_bytes: int) -> None:
        self._n_bytes += n_bytes - self._sizes.pop(path, 0)
        self._sizes[path] = n_bytes

    def _take_surplus(self) -> list[str]:
        """Return the oldest files beyond the limit, which no longer count."""
        surplus = []
        while self._n_bytes > self._max_bytes:
            path, n_bytes = self._sizes.popitem(last=False)
            self._n_bytes -= n_bytes
            surplus.append(path)
        return surplus


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _delete(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
