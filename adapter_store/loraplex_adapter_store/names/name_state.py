"""The state of a name at one time, and the changes that lead from one state to the next.

A registry writes each state whole: as a row of SQLite, or as an object of a catalogue.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from loraplex_adapter_store.errors import StoredAdapterDamaged, UnknownAdapter
from loraplex_adapter_store.plan import Family, HeadTask
from loraplex_adapter_store.report import json_fields

from .card import CardEdit
from .name_record import Content, NameRecord, check_expired, check_match, check_unchanged
from .put_options import PutOptions

FORMAT = 1
MAX_HISTORY = 100  # entries of a name's history


class Revision(NamedTuple):
    """A content that a name has or had, with its card."""

    record: NameRecord
    content: Content


@dataclass(frozen=True, slots=True)
class NameState:
    """The state of a name: its current revision, the kept ones, and its history.

    Without revisions the name does not exist: it never did, or was deleted. Methods return the next
    state and change nothing.
    """

    name: str
    number: int = 0  # of the state; 0: the name never existed
    write_id: str = ""  # identifies the writer of the state
    revisions: tuple[Revision, ...] = ()  # the current one, then kept ones, newest first
    last_revision: int = 0  # the highest number of a revision; never reused
    history: tuple[tuple[int, str, float], ...] = ()  # (revision, digest, created), oldest first
    written: float = 0.0  # seconds since the epoch, by the clock of the writer

    @property
    def current(self) -> Revision | None:
        return self.revisions[0] if self.revisions else None

    @property
    def record(self) -> NameRecord | None:
        return self.revisions[0].record if self.revisions else None

    def put(self, content: Content, options: PutOptions, *, n_kept: int) -> NameState:
        """Point the name at ``content``. Raises RevisionConflict.

        The current revision becomes a kept one; the ``n_kept`` newest of those stay.
        """
        check_match(self.name, self.record, options.if_match, options.replace)
        record = NameRecord(
            name=self.name,
            revision=self.last_revision + 1,
            digest=content.digest,
            description=options.description,
            examples=tuple(options.examples),
            provenance=options.provenance or {},
            created=time.time(),
            pinned=self.record is not None and self.record.pinned,
            expires=options.expires,
            defaults=options.defaults or {},
        )
        older = [old for old in self.revisions if old.record.digest != content.digest][:n_kept]
        retained = (
            Revision(replace(old.record, pinned=False, expires=None), old.content) for old in older
        )
        entry = (record.revision, record.digest, record.created)
        return self._next(
            revisions=(Revision(record, content), *retained),
            last_revision=record.revision,
            history=(*self.history, entry)[-MAX_HISTORY:],
        )

    def edited(self, edit: CardEdit, *, if_match: str | None) -> NameState:
        """Return the state with a changed card. Raises UnknownAdapter or RevisionConflict."""
        record = self._existing()
        check_unchanged(record, if_match)
        return self._with(
            replace(
                record,
                description=edit.description,
                examples=tuple(edit.examples),
                defaults=edit.defaults,
                provenance=record.provenance if edit.provenance is None else edit.provenance,
                edits=record.edits + 1,
            )
        )

    def pinned(self, *, pinned: bool) -> NameState:
        return self._with(replace(self._existing(), pinned=pinned))

    def expiring(self, expires: float | None) -> NameState:
        return self._with(replace(self._existing(), expires=expires))

    def deleted(self, if_match: str | None, expired_by: float | None) -> NameState:
        """Return the state of a deleted name. With ``expired_by``, only if it expires by that time.

        Raises UnknownAdapter or RevisionConflict.
        """
        record = self._existing()
        check_match(self.name, record, if_match, replace=True)
        check_expired(record, expired_by)
        return self._next(revisions=())

    def without(self, digests: Collection[str]) -> NameState:
        """Drop contents that are lost. The newest revision that is left becomes the current one."""
        good = tuple(each for each in self.revisions if each.record.digest not in digests)
        if not good or good[0] is self.current:
            return self._next(revisions=good)
        old, lost = good[0].record, self._existing()
        record = replace(
            old,
            revision=self.last_revision + 1,
            created=time.time(),
            pinned=lost.pinned,
            expires=lost.expires,
        )
        entry = (record.revision, record.digest, record.created)
        return self._next(
            revisions=(Revision(record, good[0].content), *good[1:]),
            last_revision=record.revision,
            history=(*self.history, entry)[-MAX_HISTORY:],
        )

    def described(self, contents: Mapping[str, Content]) -> NameState:
        """Replace the descriptions of these contents, by digest."""
        return self._next(
            revisions=tuple(
                Revision(record, contents.get(record.digest, content))
                for record, content in self.revisions
            )
        )

    def to_json(self) -> bytes:
        revisions = [
            {"card": json_fields(r.record), "content": json_fields(r.content)}
            for r in self.revisions
        ]
        return seal(
            {
                "format": FORMAT,
                "name": self.name,
                "number": self.number,
                "expected": self.number - 1,  # the state that the writer read
                "write_id": self.write_id,
                "deleted": not self.revisions,
                "written": self.written,
                "last_revision": self.last_revision,
                "history": [list(entry) for entry in self.history],
                "revisions": revisions,
            }
        )

    @staticmethod
    def from_json(data: bytes, name: str, number: int) -> NameState:
        """Raises StoredAdapterDamaged unless ``data`` is the state of this name and number."""
        try:
            value = unseal(data)
            if (value["format"], value["name"], value["number"]) != (FORMAT, name, number):
                raise ValueError("another object")
            state = NameState(
                name=name,
                number=number,
                write_id=str(value["write_id"]),
                revisions=tuple(
                    Revision(
                        _record_from_json(name, each["card"]), content_from_json(each["content"])
                    )
                    for each in value["revisions"]
                ),
                last_revision=int(value["last_revision"]),
                history=tuple((int(r), str(d), float(t)) for r, d, t in value["history"]),
                written=float(value["written"]),
            )
            if any(r.record.digest != r.content.digest for r in state.revisions):
                raise ValueError("a card of another content")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoredAdapterDamaged(
                f"the record of adapter {name!r} is damaged, or of another version of loraplex"
            ) from error
        return state

    def _existing(self) -> NameRecord:
        if self.record is None:
            raise UnknownAdapter(self.name)
        return self.record

    def _with(self, record: NameRecord) -> NameState:
        current = self.revisions[0]
        return self._next(revisions=(Revision(record, current.content), *self.revisions[1:]))

    def _next(self, **changes: Any) -> NameState:
        return replace(
            self,
            number=self.number + 1,
            write_id=uuid.uuid4().hex,
            written=time.time(),
            **changes,
        )


class Change(NamedTuple):
    """A change of a name that a registry has written."""

    before: NameState
    after: NameState


Transition = Callable[[NameState], NameState]  # may raise: then nothing changes


def content_from_json(value: Mapping[str, Any]) -> Content:
    """Return the content of ``json_fields``. Raises ValueError, KeyError or TypeError."""
    parts = {spec.name: value[spec.name] for spec in fields(Content)}
    parts |= {"family": Family(parts["family"]), "ranks": tuple(parts["ranks"])}
    parts["task"] = None if parts["task"] is None else HeadTask(parts["task"])
    return Content(**parts)


def _record_from_json(name: str, value: Mapping[str, Any]) -> NameRecord:
    parts = {spec.name: value[spec.name] for spec in fields(NameRecord) if spec.name != "name"}
    return NameRecord(name=name, **{**parts, "examples": tuple(parts["examples"])})


def seal(value: Mapping[str, object]) -> bytes:
    text = json.dumps(value)
    return f'{{"sha256": "{_sha256(text)}", "value": {text}}}'.encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Return the value of ``seal``. Raises ValueError, KeyError or TypeError for other data."""
    sealed = json.loads(data)
    value: dict[str, Any] = sealed["value"]
    if sealed["sha256"] != _sha256(json.dumps(value)):
        raise ValueError("the checksum does not fit")
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
