"""The names of a store that has a catalogue: changes go there, and what others changed comes here.

A name is asked for again when its last answer is ``refresh_s`` old. While the object store is down
the last answer counts for ``stale_s``; after that the name is unavailable, never guessed. The store
applies what it is told under the name's lock, so a later state is never undone by an earlier one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from loraplex_adapter_store.card import CardEdit
from loraplex_adapter_store.errors import (
    CatalogueUnavailable,
    RevisionConflict,
    StoredAdapterDamaged,
    StoreError,
)
from loraplex_adapter_store.faults import FaultLog
from loraplex_adapter_store.name_record import Content, NameRecord, Put
from loraplex_adapter_store.names import tenant_of
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.report import LoadReport

from .catalogue import Catalogue
from .content_objects import ContentMissing
from .garbage import claim_sweep, sweep
from .limits import CatalogueLimits
from .name_log import GRACE_S, Transition
from .name_state import NameState

__all__ = ["Apply", "CatalogueRegistry"]

Apply = Callable[[NameState], None]  # brings the store up to this state of a name

_N_LOCKS = 256
_N_READERS = 8  # states read at once when many names changed
_MAX_ANSWERS = 65_536  # names remembered, most of which may not exist
_MAX_REPORTS = 1024
_log = logging.getLogger(__name__)
_TRY_AGAIN_S = 2.0  # after a failure, before the object store is asked once more by a reader


class _Answer(NamedTuple):
    """What the catalogue said of a name, and when."""

    number: int
    at: float  # monotonic, when it was asked


class CatalogueRegistry:
    """Thread-safe. Changes block for a few round trips; reads while a name is fresh do not."""

    def __init__(
        self,
        catalogue: Catalogue,
        faults: FaultLog,
        limits: CatalogueLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue = catalogue
        self._faults = faults
        self._refresh_s, self._stale_s = limits.refresh_s, limits.stale_s
        self._clock = clock
        self._apply: Apply = lambda state: None
        self._locks = [threading.RLock() for _ in range(_N_LOCKS)]
        self._lock = threading.Lock()  # of what follows
        self._answers: dict[str, _Answer] = {}
        self._all_at = float("-inf")  # when everything was asked for
        self._all_lock = threading.Lock()
        self._down_until = float("-inf")
        self._sweep_at = clock() + GRACE_S  # not while servers start
        self._reports: dict[str, LoadReport] = {}  # by digest
        self._offered: dict[str, float] = {}  # uploads without a name yet, and since when

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

    def forget_content(self, digest: str) -> None:
        """Of this server only: the catalogue's contents are for all."""
        with self._lock:
            self._reports.pop(digest, None)

    def close(self) -> None:
        pass

    # What is known without asking.

    def is_fresh(self, name: str) -> bool:
        """Whether what the store knows of ``name`` may be used as it is. Takes a microsecond."""
        answer = self._answers.get(name)
        return answer is not None and self._clock() - answer.at <= self._refresh_s

    # Following what others change.

    def follow(self, name: str) -> None:
        """Brings the store up to date with ``name``, if its last answer is too old.

        Raises CatalogueUnavailable if there is no answer that may still be used.
        """
        if self.is_fresh(name) or self._may_use(self._answers.get(name)):
            return
        with self.changing(name):
            if self.is_fresh(name):  # another thread has asked meanwhile
                return
            began = self._clock()
            try:
                with self._asked():
                    number = self._catalogue.names.newest_number(name)
                    self._bring(name, number, began)
            except CatalogueUnavailable:
                if not self._may_use(self._answers.get(name)):
                    raise

    def refresh(self, name: str) -> None:
        """Brings the store up to date with ``name``, however fresh it is: before a change of it.

        Raises CatalogueUnavailable.
        """
        with self.changing(name):
            began = self._clock()
            with self._asked(even_if_down=True):
                self._bring(name, self._catalogue.names.newest_number(name), began)

    def follow_all(self) -> None:
        """``follow`` for every name there is: one listing, and a read of each that changed."""
        if self._clock() - self._all_at <= self._refresh_s or self._may_use_all():
            return
        with self._all_lock:
            began = self._clock()
            if began - self._all_at <= self._refresh_s:
                return
            try:
                with self._asked():
                    self._bring_all(began)
                self._all_at = began
            except CatalogueUnavailable:
                if not self._may_use_all():
                    raise

    def follow_tenant(self, tenant: str) -> None:
        """Brings the store up to date with all names of a tenant, however fresh they are.

        Raises CatalogueUnavailable.
        """
        with self._asked(even_if_down=True):
            self._bring_all(self._clock(), tenant)

    def sweep_if_due(self) -> None:
        """Deletes garbage from the catalogue, once in an hour by one of all its servers."""
        if self._clock() < self._sweep_at:
            return
        self._sweep_at = self._clock() + GRACE_S
        with self._asked():
            if claim_sweep(self._catalogue):
                sweep(self._catalogue)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Holds off other threads that follow or change ``name``."""
        with self._locks[hash(name) % _N_LOCKS]:
            yield

    # The content of names.

    def offer(self, content: Content, report: LoadReport, folder: Path, tenant: str) -> Content:
        """Uploads a content that a name is about to get. The content with its upload."""
        with self._asked(even_if_down=True):
            stored = self._catalogue.contents.put(folder, content, report, tenant)
        with self._lock:
            self._offered[stored.upload] = self._clock()
        return stored

    def withdraw(self, content: Content) -> None:
        """The content gets no name: what was uploaded goes with the garbage."""
        with self._lock:
            self._offered.pop(content.upload, None)

    def find_content(self, digest: str) -> Content | None:
        """A content that no name here has (any more), but the catalogue may still have."""
        with self._asked():
            manifest = self._catalogue.contents.find(digest)
        return None if manifest is None else manifest.content

    def fetch(
        self,
        content: Content,
        write: Callable[[str, Iterator[bytes]], Path],
        cancelled: threading.Event | None,
    ) -> None:
        """Brings and verifies the files of a content. See ``ContentObjects.fetch``."""
        with self._asked(even_if_down=True):
            try:
                report = self._catalogue.contents.fetch(content, write, cancelled)
            except ContentMissing:  # this copy went with its name; another name's may be there
                report = self._catalogue.contents.fetch(self._copy(content), write, cancelled)
        self._remember(content.digest, report)

    def report(self, content: Content) -> LoadReport:
        report = self._reports.get(content.digest)
        if report is None:
            with self._asked():
                contents = self._catalogue.contents
                try:
                    report = contents.manifest(content.digest, content.upload).report
                except ContentMissing:
                    copy = self._copy(content)
                    report = contents.manifest(copy.digest, copy.upload).report
            self._remember(content.digest, report)
        return report

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of the newest contents the name had, oldest first."""
        with self._asked():
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
            self._check_usable(content, state)
            return state.put(content, options, n_kept=n_kept)

        before, after = self._change(name, moved)
        self._remember(content.digest, report)
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
            began = self._clock()
            with self._asked(even_if_down=True), self._told_anew(name):
                before, after = self._catalogue.names.change(
                    name, lambda state: state.deleted(if_match, expired_by)
                )
            self._apply(before)
            self._answered(name, after.number, began)

    def _copy(self, content: Content) -> Content:
        """Another upload of the same content. Raises ContentMissing."""
        found = self._catalogue.contents.find(content.digest, content.plan_sha256)
        if found is None:
            raise ContentMissing(content.digest)
        return found.content

    def _check_usable(self, content: Content, state: NameState) -> None:
        """An upload that nothing refers to may be garbage: it can have no name any more."""
        since = self._offered.get(content.upload)
        if since is None:
            if all(content.upload != kept.content.upload for kept in state.revisions):
                digest = None if state.record is None else state.record.digest
                raise RevisionConflict(
                    f"adapter {state.name!r} has not kept {content.digest[:12]} any more", digest
                )
        elif self._clock() - since > GRACE_S / 2:
            raise CatalogueUnavailable("the upload took too long to get its name; send it again")

    def _edited(self, name: str, transition: Transition) -> NameRecord:
        _, after = self._change(name, transition)
        assert after.record is not None
        return after.record

    def _change(self, name: str, transition: Transition) -> tuple[NameState, NameState]:
        with self.changing(name):
            began = self._clock()
            with self._asked(even_if_down=True), self._told_anew(name):
                before, after = self._catalogue.names.change(name, transition)
            self._apply(after)
            self._answered(name, after.number, began)
            return before, after

    def _bring(self, name: str, number: int, began: float) -> None:
        """Under the lock of the name. ``number``: the newest at ``began`` or after."""
        known = self._answers.get(name)
        if known is None or known.number != number:
            state = self._catalogue.names.read(name) if number else NameState(name)
            self._apply(state)
            number = state.number
        self._answered(name, number, began)

    def _bring_all(self, began: float, tenant: str | None = None) -> None:
        """Every name, or all of a tenant. Nobody may hold the lock of a name who waits for it."""
        numbers = dict(self._catalogue.names.newest_numbers(tenant))
        with self._lock:
            known = {name: answer.number for name, answer in self._answers.items()}
        if tenant is not None:
            known = {name: number for name, number in known.items() if tenant_of(name) == tenant}
        numbers = {**{name: 0 for name, number in known.items() if number}, **numbers}

        def bring(item: tuple[str, int]) -> None:
            name, number = item
            with self.changing(name):
                answer = self._answers.get(name)
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
        with self._lock:
            for name, number in numbers.items():
                answer = self._answers.get(name)
                if answer is not None and answer.number == number and answer.at < began:
                    self._answers[name] = _Answer(number, began)

    def _answered(self, name: str, number: int, began: float) -> None:
        with self._lock:
            self._answers.pop(name, None)
            self._answers[name] = _Answer(number, began)
            if len(self._answers) > _MAX_ANSWERS:
                absent = (each for each, answer in self._answers.items() if not answer.number)
                oldest = next(absent, None)
                if oldest is not None:
                    del self._answers[oldest]

    @contextmanager
    def _told_anew(self, name: str) -> Iterator[None]:
        """After a change that failed, what the store knows of the name may be old."""
        try:
            yield
        except StoreError:
            with self._lock:
                answer = self._answers.get(name)
                if answer is not None:
                    outdated = self._clock() - self._refresh_s - 1.0
                    self._answers[name] = _Answer(answer.number, min(answer.at, outdated))
            raise

    def _remember(self, digest: str, report: LoadReport) -> None:
        with self._lock:
            self._reports.pop(digest, None)
            self._reports[digest] = report
            if len(self._reports) > _MAX_REPORTS:
                del self._reports[next(iter(self._reports))]

    def _may_use(self, answer: _Answer | None) -> bool:
        """An older answer, while the object store is down."""
        now = self._clock()
        return now < self._down_until and answer is not None and now - answer.at <= self._stale_s

    def _may_use_all(self) -> bool:
        now = self._clock()
        return now < self._down_until and now - self._all_at <= self._stale_s

    @contextmanager
    def _asked(self, *, even_if_down: bool = False) -> Iterator[None]:
        """A use of the object store. Readers do not ask again right after it failed."""
        if not even_if_down and self._clock() < self._down_until:
            raise CatalogueUnavailable("the catalogue could not be reached a moment ago; try again")
        try:
            yield
        except CatalogueUnavailable as error:
            self._down_until = self._clock() + _TRY_AGAIN_S
            self._faults.failed("catalogue", error)
            raise
        self._down_until = float("-inf")
        self._faults.worked("catalogue")
