"""Keeps the store in step with the folders below --adapters-dir."""

import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from watchfiles import watch

from loraplex_adapter_store.errors import CatalogueUnavailable, StoreError
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.settings.config import LoraModule

from .adapter_folders import find_folders, is_being_copied, is_current, is_from, put_folder

_Signature = tuple[tuple[str, int, int, int], ...]  # of each file: name, size, times in ns
_SETTLE_MS = 400  # without changes before a scan, because a copy may still run
_RESCAN_MS = 10_000  # also without changes, which some file systems do not report
_N_ADDERS = 2  # threads that add the folders of the start
_log = logging.getLogger(__name__)


class WatchedFolders:
    """Owner of the adapters of these directories. Any thread may call ``scan``.

    A name that a client has replaced is left alone until its folder changes.
    """

    def __init__(self, store: AdapterStore, roots: Sequence[Path]) -> None:
        self._store = store
        self._roots = tuple(roots)
        self.refused: dict[str, str] = {}  # name → why its folder is not served
        self._seen: dict[LoraModule, _Signature] = {}  # state of each folder at the last scan
        self._scanning = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._first: dict[str, LoraModule] = {}  # the folders that ``start`` has found, by name

    def scan(self) -> None:
        """Add new and changed folders and remove missing ones. Each refusal is logged once."""
        with self._scanning:
            roots = [root for root in self._roots if root.is_dir()]
            modules = [module for root in roots for module in find_folders(root)]
            # Adapters of a missing root stay: the root may be a mount that comes back.
            known = {m for m in self._seen if any(m.path.is_relative_to(root) for root in roots)}
            for missing in known - set(modules):
                self._remove(missing)
                del self._seen[missing]
                self.refused.pop(missing.name, None)
            for module in modules:
                self._update(module)

    def start(self) -> None:
        """Start to add the folders that no ``scan`` has seen, and then to watch.

        The names are expected in the store at once. Missing directories are logged and skipped.
        """
        for root in self._roots:
            if not root.is_dir():
                _log.warning("the adapters directory %s does not exist; it is not watched", root)
        roots = [root for root in self._roots if root.is_dir()]
        self._first = {
            module.name: module
            for root in roots
            for module in find_folders(root)
            if module not in self._seen
        }
        self._store.expected.expect(self._first)
        if roots:
            self._thread = threading.Thread(
                target=self._watch, args=(roots,), name="loraplex-watch", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _add_first(self) -> None:
        """Add the folders of the start, first those that somebody waits for."""
        began = time.monotonic()
        with self._scanning, ThreadPoolExecutor(_N_ADDERS, "loraplex-adding") as adders:
            for _ in range(_N_ADDERS):
                adders.submit(self._add_expected)
        if self._first and not self._stop.is_set():
            seconds = time.monotonic() - began
            _log.info("%d folders of adapters were read in %.1f s", len(self._first), seconds)

    def _add_expected(self) -> None:
        expected = self._store.expected
        while (name := expected.next()) is not None:
            try:
                if not self._stop.is_set():
                    self._update(self._first[name])
            except Exception:
                _log.exception("the folder of adapter %s could not be read", name)
            finally:
                expected.arrived(name)

    def _watch(self, roots: Sequence[Path]) -> None:
        self._add_first()
        changes = watch(
            *roots,
            stop_event=self._stop,
            step=_SETTLE_MS,
            rust_timeout=_RESCAN_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        for _ in changes:
            try:
                self.scan()
            except Exception:
                _log.exception("the adapters directories could not be read; trying again later")

    def _update(self, module: LoraModule) -> None:
        try:
            signature = _signature(module.path)
            known = self._seen.get(module)
            if known == signature or is_being_copied(module.path):
                return
            self._seen[module] = signature
            if known is None and is_current(self._store, module):  # stored before a restart
                return
            card = put_folder(self._store, module)
            self.refused.pop(module.name, None)
            _log.info("adapter %s of %s is served (%s)", card.name, module.path, card.digest[:12])
        except (StoreError, OSError, sqlite3.Error) as error:
            is_refusal = isinstance(error, StoreError) and not isinstance(
                error, CatalogueUnavailable
            )
            if not is_refusal:  # the next scan tries again
                self._seen.pop(module, None)
            self.refused[module.name] = str(error)
            _log.error("adapter %s in %s is not served: %s", module.name, module.path, error)

    def _remove(self, module: LoraModule) -> None:
        try:
            card = self._store.get(module.name)
            if is_from(card, module.path):
                self._store.start_delete(module.name, if_match=card.digest)
                _log.info("adapter %s is gone with %s", module.name, module.path)
        except StoreError as error:  # changed by a client meanwhile
            _log.info("adapter %s of %s is left as it is: %s", module.name, module.path, error)


def _signature(folder: Path) -> _Signature:
    files = []
    for file in sorted(folder.iterdir()):
        status = file.stat()
        files.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(files)
