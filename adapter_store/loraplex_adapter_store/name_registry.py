"""Where a store keeps what names mean: in SQLite of its own, or in a catalogue of many servers."""

from __future__ import annotations

from typing import Protocol

from .card import CardEdit
from .name_record import Content, NameRecord, Put
from .put_options import PutOptions
from .report import LoadReport

__all__ = ["NameRegistry"]


class NameRegistry(Protocol):
    """Names move by compare-and-set. Thread-safe; calls block. One method for each change."""

    def names(self) -> tuple[NameRecord, ...]:
        """At the start of the store, like the next two."""

    def kept(self) -> tuple[NameRecord, ...]:
        """Older revisions whose contents are kept, newest first."""

    def contents(self) -> tuple[Content, ...]: ...

    def report(self, content: Content) -> LoadReport:
        """Raises UnknownAdapter or StoredAdapterDamaged where it is gone."""

    def history(self, name: str) -> tuple[tuple[int, str, float], ...]:
        """(revision, digest, created) of contents the name had, oldest first."""

    def put(
        self,
        name: str,
        content: Content,
        report: LoadReport,
        options: PutOptions,
        *,
        n_kept: int,
    ) -> Put:
        """Points ``name`` at ``content``. Raises RevisionConflict and changes nothing.

        The revision it had becomes a kept one; of those the ``n_kept`` newest stay.
        """

    def remove_name(
        self, name: str, if_match: str | None = None, *, expired_by: float | None = None
    ) -> None:
        """``expired_by``: only if it expires by then. Raises UnknownAdapter or RevisionConflict."""

    def edit(self, name: str, edit: CardEdit, *, if_match: str | None) -> NameRecord:
        """A new card for the same content. Raises UnknownAdapter or RevisionConflict."""

    def set_pinned(self, name: str, *, pinned: bool) -> NameRecord:
        """Raises UnknownAdapter."""

    def set_expiry(self, name: str, expires: float | None) -> NameRecord:
        """Raises UnknownAdapter."""

    def forget_content(self, digest: str) -> None:
        """This store has no use for it any more."""

    def close(self) -> None: ...
