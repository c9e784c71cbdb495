"""The registry of a store with a catalogue, whose names other servers may change.

A state is applied to the store under the lock of its name, so an earlier state never replaces a
later one. ``freshness`` decides how long an answer counts.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from loraplex_adapter_store.errors import CatalogueUnavailable, StoredAdapterDamaged, StoreError
from loraplex_adapter_store.names.name_record import Content
from loraplex_adapter_store.names.name_registry import Apply, NameRegistry
from loraplex_adapter_store.names.name_state import Change, NameState, Transition
from loraplex_adapter_store.names.name_syntax import is_valid_name
from loraplex_adapter_store.report import LoadReport

from .catalogue import Catalogue, claim_sweep, sweep
from .freshness import ALL_NAMES, Freshness
from .name_log import GRACE_S
from .shared_contents import SharedContents

_N_LOCKS = 256
_N_READERS = 8  # threads that read states when many names have changed
_log = logging.getLogger(__name__)


class CatalogueRegistry(NameRegistry):
    """Changes block for a few round trips; reads of a fresh name do not block.

    A thread of its own looks for changes by others, so that memory is freed.
    """

    is_shared: ClassVar[bool] = True

    def __init__(
        self, catalogue: Catalogue, freshness: Freshness, contents: SharedContents, poll_s: float
    ) -> None:
        """``poll_s``: seconds between two refreshes of names that no request uses."""
        self._catalogue = catalogue
        self._freshness = freshness
        self._contents = contents
        self._poll_s = poll_s
        self._apply: Apply = lambda state: None
        self._locks = [threading.RLock() for _ in range(_N_LOCKS)]
        self._all_lock = threading.Lock()
        self._sweep_at = freshness.now() + GRACE_S  # not while servers start
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="loraplex-follow", daemon=True)

    def start(self, apply: Apply) -> bool:
        """Load the names. ``apply`` runs under the lock of a name, on the thread that read it.

        Returns False if the catalogue cannot be reached: a server starts without it, too.
        """
        self._apply = apply
        try:
            self.follow_all()
        except CatalogueUnavailable as error:
            _log.warning("%s; adapters are served when the catalogue is back", error)
            return False
        finally:
            self._thread.start()
        return True

    @contextmanager
    def change(
        self, name: str, transition: Transition, report: LoadReport | None = None
    ) -> Iterator[Change]:
        """Raises CatalogueUnavailable too, after which the change may have happened."""
        with self.changing(name):
            began = self._freshness.now()
            asking = self._freshness.asking(even_if_down=True)
            with asking, self._freshness.outdated_by_failure(name):
                change = self._catalogue.names.change(name, transition)
            if report is not None and change.after.record is not None:
                self._contents.remember(change.after.record.digest, report)
            yield change
            self._freshness.answered(name, change.after.number, began)

    def report(self, content: Content) -> LoadReport:
        return self._contents.report(content)

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        with self._freshness.asking():
            return self._catalogue.names.read(name).history

    def forget_content(self, digest: str) -> None:
        self._contents.forget(digest)

    def usable(self, content: Content, state: NameState) -> Content:
        return self._contents.usable(content, state)

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_fresh(self, name: str) -> bool:
        return self._freshness.is_fresh(name)

    def follow(self, name: str) -> None:
        """Raises CatalogueUnavailable if no answer may be used."""
        if is_valid_name(name):
            self._read_unless_usable(name, self.changing(name), lambda: self._read(name))

    def refresh(self, name: str) -> None:
        with self.changing(name), self._freshness.asking(even_if_down=True):
            self._read(name)

    def follow_all(self) -> None:
        """List all names, and read those that have changed."""
        self._read_unless_usable(ALL_NAMES, self._all_lock, self._read_changed)

    def refresh_tenant(self, tenant: str) -> None:
        with self._freshness.asking(even_if_down=True):
            self._read_changed(tenant)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        with self._locks[hash(name) % _N_LOCKS]:
            yield

    def _read_unless_usable(
        self, name: str, lock: AbstractContextManager[object], read: Callable[[], None]
    ) -> None:
        if self._freshness.is_usable(name):
            return
        with lock:
            if self._freshness.is_fresh(name):  # another thread has asked meanwhile
                return
            try:
                with self._freshness.asking():
                    read()
            except CatalogueUnavailable:
                if not self._freshness.is_usable(name):
                    raise

    def _read(self, name: str) -> None:
        """Read the name's newest state. The caller holds the lock of the name."""
        began = self._freshness.now()
        self._apply_newest(name, self._catalogue.names.newest_number(name), began)

    def _apply_newest(self, name: str, number: int, began: float) -> None:
        """Apply state ``number``, the newest after ``began``. The caller holds the name's lock."""
        answer = self._freshness.answer(name)
        if answer is None or answer.number != number:
            state = self._catalogue.names.read(name) if number else NameState(name)
            self._apply(state)
            number = state.number
        self._freshness.answered(name, number, began)

    def _read_changed(self, tenant: str | None = None) -> None:
        """List all names, or a tenant's, and read those that have changed.

        The caller must not hold the lock of a name that waits for this thread.
        """
        began = self._freshness.now()
        listed = self._catalogue.names.newest_numbers(tenant)
        known = self._freshness.numbers(tenant)
        gone = {name: 0 for name, number in known.items() if number and name not in listed}
        numbers = {**gone, **listed}

        def read(name: str) -> None:
            with self.changing(name):
                answer = self._freshness.answer(name)
                if answer is not None and answer.at >= began:  # another thread has asked since
                    return
                try:
                    self._apply_newest(name, numbers[name], began)
                except StoredAdapterDamaged as error:  # requests for this name get the error
                    _log.warning("%s", error)

        changed = [name for name, number in numbers.items() if known.get(name) != number]
        with ThreadPoolExecutor(_N_READERS, thread_name_prefix="loraplex-catalogue") as pool:
            for _ in pool.map(read, changed):
                pass  # raises the error of a read
        self._freshness.confirmed(numbers, began)
        if tenant is None:
            self._freshness.answered(ALL_NAMES, 0, began)

    def _poll(self) -> None:
        while not self._closing.wait(self._poll_s):
            try:
                self.follow_all()
                self._sweep_if_due()
            except StoreError as error:
                _log.debug("the catalogue cannot be followed now: %s", error)
            except Exception:
                _log.exception("following the catalogue failed; it goes on")

    def _sweep_if_due(self) -> None:
        """Delete garbage from the catalogue if this server is the first to try within the hour."""
        if self._freshness.now() < self._sweep_at:
            return
        self._sweep_at = self._freshness.now() + GRACE_S
        with self._freshness.asking():
            if claim_sweep(self._catalogue):
                sweep(self._catalogue)
