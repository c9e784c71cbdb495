"""Keeps a store's picture of the names up to date with the catalogue."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.name_index import NameIndex
from loraplex_adapter_store.name_record import Put
from loraplex_adapter_store.retirement import Retirement

from .catalogue_registry import CatalogueRegistry
from .name_state import NameState

__all__ = ["Following"]

_log = logging.getLogger(__name__)


class Following:
    """Applies what others changed; a thread of its own looks for it, so that memory is freed."""

    def __init__(
        self,
        registry: CatalogueRegistry,
        index: NameIndex,
        retirement: Retirement,
        writing: threading.RLock,
        on_pinned: Callable[[], None],
        poll_s: float,
    ) -> None:
        self._registry = registry
        self._index = index
        self._retirement = retirement
        self._writing = writing
        self._on_pinned = on_pinned
        self._poll_s = poll_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="loraplex-follow", daemon=True)
        registry.on_change(self._apply)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _apply(self, state: NameState) -> None:
        """Under the lock of the name."""
        with self._writing:
            if state.current is not None:
                put = Put(
                    state.current.record,
                    tuple(revision.record for revision in state.revisions[1:]),
                    None,
                )
                kept_contents = [revision.content for revision in state.revisions[1:]]
                let_go = self._index.point(put, state.current.content, kept_contents)
                for revision in state.revisions:
                    self._retirement.named_again(revision.content.digest)
            elif self._index.has(state.name):
                removed = self._index.remove_name(state.name)
                let_go = (removed.digest, *removed.kept)
            else:
                return
            self._on_pinned()
        for digest in let_go:
            self._retirement.retire_later(digest)

    def _poll(self) -> None:
        while not self._closing.wait(self._poll_s):
            try:
                self._registry.follow_all()
                self._registry.sweep_if_due()
            except StoreError as error:
                _log.debug("the catalogue cannot be followed now: %s", error)
            except Exception:
                _log.exception("following the catalogue failed; it goes on")
