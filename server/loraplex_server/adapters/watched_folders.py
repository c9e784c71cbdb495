"""Keeps the store in step with the folders below --adapters-dir."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from watchfiles import watch

from loraplex_adapter_store.errors import CatalogueUnavailable, StoreError
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.settings import LoraModule

from .adapter_folders import find_folders, is_being_copied, is_current, is_from, put_folder

__all__ = ["WatchedFolders"]

_Signature = tuple[tuple[str, int, int, int], ...]  # of each file: name, size, times in ns
_SETTLE_MS = 400  # quiet after a change before it is looked at: a copy may still be running
_RESCAN_MS = 10_000  # also without a change: not every file system tells of them
_log = logging.getLogger(__name__)


class WatchedFolders:
    """Owner of the adapters that these directories brought. ``scan`` and the thread take turns.

    A name that a client took over meanwhile is left alone until the folder changes.
    """

    def __init__(self, store: AdapterStore, roots: Sequence[Path]) -> None:
        self._store = store
        self._roots = tuple(roots)
        self._seen: dict[LoraModule, _Signature] = {}  # folders and how they were last looked at
        self._scanning = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def scan(self) -> None:
        """Puts what is new or changed and removes what is gone. Refusals are logged, once each."""
        with self._scanning:
            there = [root for root in self._roots if root.is_dir()]
            found = [module for root in there for module in find_folders(root)]
            # A root that is away, as a mount may be, takes nothing with it.
            known = {m for m in self._seen if any(m.path.is_relative_to(root) for root in there)}
            for gone in known - set(found):
                self._remove(gone)
                del self._seen[gone]
            for module in found:
                self._look_at(module)

    def start(self) -> None:
        """Watches from now on. Directories that do not exist are named in the log and left out."""
        for root in self._roots:
            if not root.is_dir():
                _log.warning("the adapters directory %s does not exist; it is not watched", root)
        there = [root for root in self._roots if root.is_dir()]
        if there:
            self._thread = threading.Thread(
                target=self._watch, args=(there,), name="loraplex-watch", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, roots: Sequence[Path]) -> None:
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
                _log.exception("the adapters directories could not be read; the next change may do")

    def _look_at(self, module: LoraModule) -> None:
        try:
            signature = _signature(module.path)
            known = self._seen.get(module)
            if known == signature or is_being_copied(module.path):
                return
            self._seen[module] = signature
            if known is None and is_current(self._store, module):  # as an earlier life left it
                return
            card = put_folder(self._store, module)
            _log.info("adapter %s of %s is served (%s)", card.name, module.path, card.digest[:12])
        except (StoreError, OSError, sqlite3.Error) as error:
            is_ours = not isinstance(error, StoreError) or isinstance(error, CatalogueUnavailable)
            if is_ours:  # a failure that passes: the next look tries again
                self._seen.pop(module, None)
            _log.error("adapter %s in %s is not served: %s", module.name, module.path, error)

    def _remove(self, module: LoraModule) -> None:
        try:
            card = self._store.get(module.name)
            if is_from(card, module.path):
                self._store.start_delete(module.name, if_match=card.digest)
                _log.info("adapter %s is gone with %s", module.name, module.path)
        except StoreError as error:  # a client was faster
            _log.info("adapter %s of %s is left as it is: %s", module.name, module.path, error)


def _signature(folder: Path) -> _Signature:
    files = []
    for file in sorted(folder.iterdir()):
        status = file.stat()
        files.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(files)
