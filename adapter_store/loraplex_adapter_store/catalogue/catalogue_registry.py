"""The names of a store that has a catalogue: changes go there, and what others changed comes here.

The store applies what it is told under the name's lock, so a later state is never undone by an
earlier one. How long an answer counts, ``freshness`` says.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from loraplex_adapter_store.card import CardEdit
from loraplex_adapter_store.errors import CatalogueUnavailable, StoredAdapterDamaged
from loraplex_adapter_store.name_record import Content, NameRecord, Put
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.report import LoadReport

from .catalogue import Catalogue
from .freshness import Freshness
from .garbage import claim_sweep, sweep
from .name_log import GRACE_S, Transition
from .name_state import NameState
from .shared_contents import SharedContents

__all__ = ["Apply", "CatalogueRegistry"]

Apply = Callable[[NameState], None]  # brings the store up to this state of a name

_N_LOCKS = 256
_N_READERS = 8  # states read at once when many names changed
_log = logging.getLogger(__name__)


class CatalogueRegistry:
    """Thread-safe. Changes block for a few round trips; reads while a name is fresh do not."""

    def __init__(
        self, catalogue: Catalogue, freshness: Freshness, contents: SharedContents
    ) -> None:
        self._catalogue = catalogue
        self._freshness = freshness
        self._contents = contents
        self._apply: Apply = lambda state: None
        self._locks = [threading.RLock() for _ in range(_N_LOCKS)]
        self._all_lock = threading.Lock()
        self._sweep_at = freshness.now() + GRACE_S  # not while servers start

    def on_change(self, apply: Apply) -> None:
        """``apply`` runs under the lock of the name, on the thread that read or changed it."""
        self._apply = apply

    def names(self) -> tuple[NameRecord, ...]:
        """None before they are followed; so it is with the next two."""
        return ()

    def kept(self) -> tuple[NameRecord, ...]:
        return ()

    def contents(self) -> tuple[Content, ...]:
        return ()

    def report(self, content: Content) -> LoadReport:
        return self._contents.report(content)

    def forget_content(self, digest: str) -> None:
        self._contents.forget(digest)

    def close(self) -> None:
        pass

    # Following what others change.

    def is_fresh(self, name: str) -> bool:
        """Whether what the store knows of ``name`` may be used as it is. Takes a microsecond."""
        return self._freshness.is_fresh(name)

    def follow(self, name: str) -> None:
        """Brings the store up to date with ``name``, if its last answer is too old.

        Raises CatalogueUnavailable if there is no answer that may still be used.
        """
        if self._freshness.is_fresh(name) or self._freshness.may_use(name):
            return
        with self.changing(name):
            if self._freshness.is_fresh(name):  # another thread has asked meanwhile
                return
            began = self._freshness.now()
            try:
                with self._freshness.asking():
                    number = self._catalogue.names.newest_number(name)
                    self._bring(name, number, began)
            except CatalogueUnavailable:
                if not self._freshness.may_use(name):
                    raise

    def refresh(self, name: str) -> None:
        """Brings the store up to date with ``name``, however fresh it is: before a change of it.

        Raises CatalogueUnavailable.
        """
        with self.changing(name):
            began = self._freshness.now()
            with self._freshness.asking(even_if_down=True):
                self._bring(name, self._catalogue.names.newest_number(name), began)

    def follow_all(self) -> None:
        """``follow`` for every name there is: one listing, and a read of each that changed."""
        if self._freshness.all_fresh() or self._freshness.may_use_all():
            return
        with self._all_lock:
            began = self._freshness.now()
            if self._freshness.all_fresh():
                return
            try:
                with self._freshness.asking():
                    self._bring_all(began)
                self._freshness.all_answered(began)
            except CatalogueUnavailable:
                if not self._freshness.may_use_all():
                    raise

    def follow_tenant(self, tenant: str) -> None:
        """Brings the store up to date with all names of a tenant, however fresh they are.

        Raises CatalogueUnavailable.
        """
        with self._freshness.asking(even_if_down=True):
            self._bring_all(self._freshness.now(), tenant)

    def sweep_if_due(self) -> None:
        """Deletes garbage from the catalogue, once in an hour by one of all its servers."""
        if self._freshness.now() < self._sweep_at:
            return
        self._sweep_at = self._freshness.now() + GRACE_S
        with self._freshness.asking():
            if claim_sweep(self._catalogue):
                sweep(self._catalogue)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Holds off other threads that follow or change ``name``."""
        with self._locks[hash(name) % _N_LOCKS]:
            yield

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of the newest contents the name had, oldest first."""
        with self._freshness.asking():
            return self._catalogue.names.read(name).history

    # Changes. Each has told the store the new state when it returns, except ``remove_name``.

    def put(
        self,
        name: str,
        content: Content,
        report: LoadReport,
        options: PutOptions,
        *,
        n_kept: int,
    ) -> Put:
        """Points ``name`` at ``content``: what was offered, or what the name has kept.

        Raises RevisionConflict and changes nothing.
        """

        def moved(state: NameState) -> NameState:
            return state.put(self._contents.usable(content, state), options, n_kept=n_kept)

        before, after = self._change(name, moved)
        self._contents.remember(content.digest, report)
        assert after.record is not None
        kept = tuple(revision.record for revision in after.revisions[1:])
        return Put(after.record, kept, before.record)

    def edit(self, name: str, edit: CardEdit, *, if_match: str | None) -> NameRecord:
        """A new card for the same content. Raises UnknownAdapter or RevisionConflict."""
        return self._edited(name, lambda state: state.edited(edit, if_match=if_match))

    def set_pinned(self, name: str, *, pinned: bool) -> NameRecord:
        return self._edited(name, lambda state: state.pinned(pinned=pinned))

    def set_expiry(self, name: str, expires: float | None) -> NameRecord:
        return self._edited(name, lambda state: state.expiring(expires))

    def remove_name(
        self, name: str, if_match: str | None = None, *, expired_by: float | None = None
    ) -> None:
        """The store knows the name as it was before, and forgets it itself.

        ``expired_by``: only if it expires by then. Raises UnknownAdapter or RevisionConflict.
        """
        with self.changing(name):
            began = self._freshness.now()
            with (
                self._freshness.asking(even_if_down=True),
                self._freshness.outdated_by_failure(name),
            ):
                before, after = self._catalogue.names.change(
                    name, lambda state: state.deleted(if_match, expired_by)
                )
            self._apply(before)
            self._freshness.answered(name, after.number, began)

    def _edited(self, name: str, transition: Transition) -> NameRecord:
        _, after = self._change(name, transition)
        assert after.record is not None
        return after.record

    def _change(self, name: str, transition: Transition) -> tuple[NameState, NameState]:
        with self.changing(name):
            began = self._freshness.now()
            with (
                self._freshness.asking(even_if_down=True),
                self._freshness.outdated_by_failure(name),
            ):
                before, after = self._catalogue.names.change(name, transition)
            self._apply(after)
            self._freshness.answered(name, after.number, began)
            return before, after

    def _bring(self, name: str, number: int, began: float) -> None:
        """Under the lock of the name. ``number``: the newest at ``began`` or after."""
        known = self._freshness.answer(name)
        if known is None or known.number != number:
            state = self._catalogue.names.read(name) if number else NameState(name)
            self._apply(state)
            number = state.number
        self._freshness.answered(name, number, began)

    def _bring_all(self, began: float, tenant: str | None = None) -> None:
        """Every name, or all of a tenant. Nobody may hold the lock of a name who waits for it."""
        numbers = dict(self._catalogue.names.newest_numbers(tenant))
        known = self._freshness.numbers(tenant)
        numbers = {**{name: 0 for name, number in known.items() if number}, **numbers}

        def bring(item: tuple[str, int]) -> None:
            name, number = item
            with self.changing(name):
                answer = self._freshness.answer(name)
                if answer is not None and answer.at >= began:  # it was asked for since
                    return
                try:
                    self._bring(name, number, began)
                except StoredAdapterDamaged as error:  # who asks for this name gets the error
                    _log.warning("%s", error)

        changed = [item for item in numbers.items() if known.get(item[0]) != item[1]]
        if len(changed) > 1:
            with ThreadPoolExecutor(_N_READERS, thread_name_prefix="loraplex-catalogue") as pool:
                for _ in pool.map(bring, changed):
                    pass  # raises what a read raised
        elif changed:
            bring(changed[0])
        self._freshness.confirmed(numbers, began)
