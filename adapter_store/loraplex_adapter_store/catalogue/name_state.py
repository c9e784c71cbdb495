"""What a name is at one time: one small object of the catalogue, never changed once written.

Every change of a name writes the next state whole; the one with the highest number is the name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from loraplex_adapter_store.card import CardEdit
from loraplex_adapter_store.errors import StoredAdapterDamaged, UnknownAdapter
from loraplex_adapter_store.name_record import (
    Content,
    NameRecord,
    check_expired,
    check_match,
    check_unchanged,
)
from loraplex_adapter_store.plan import Family, HeadTask
from loraplex_adapter_store.put_options import PutOptions
from loraplex_adapter_store.report import JsonValue

from .sealed_json import seal, unseal

__all__ = ["NameState", "Revision", "content_from_json", "content_to_json"]

FORMAT = 1
MAX_HISTORY = 100  # contents of a name that its history still tells of


class Revision(NamedTuple):
    """A content that a name has or had, and the card it has there."""

    record: NameRecord
    content: Content


@dataclass(frozen=True, slots=True)
class NameState:
    """``revisions``: the current one, then those that are kept, newest first.

    None at all: the name does not exist, because it never did or was deleted.
    """

    name: str
    number: int = 0  # of the state; 0: there is none in the catalogue
    write_id: str = ""  # tells a writer whose state it finds
    revisions: tuple[Revision, ...] = ()
    last_revision: int = 0  # the highest number that a content of this name had
    history: tuple[tuple[int, str, float], ...] = ()  # (revision, digest, created), oldest first
    written: float = 0.0  # seconds since the epoch, by the clock of the writer

    @property
    def current(self) -> Revision | None:
        return self.revisions[0] if self.revisions else None

    @property
    def record(self) -> NameRecord | None:
        return self.revisions[0].record if self.revisions else None

    def put(self, content: Content, options: PutOptions, *, n_kept: int) -> NameState:
        """The name with another content. Raises RevisionConflict."""
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
        kept = (
            Revision(replace(old.record, pinned=False, expires=None), old.content) for old in older
        )
        told = (record.revision, record.digest, record.created)
        return self._next(
            revisions=(Revision(record, content), *kept),
            last_revision=record.revision,
            history=(*self.history, told)[-MAX_HISTORY:],
        )

    def edited(self, edit: CardEdit, *, if_match: str | None) -> NameState:
        """Another card for the same content. Raises UnknownAdapter or RevisionConflict."""
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
        """Raises UnknownAdapter, also if it should expire and lives on, or RevisionConflict."""
        record = self._existing()
        check_match(self.name, record, if_match, replace=True)
        check_expired(record, expired_by)
        return self._next(revisions=())

    def to_json(self) -> bytes:
        revisions = [
            {"card": _record_to_json(r.record), "content": content_to_json(r.content)}
            for r in self.revisions
        ]
        return seal(
            {
                "format": FORMAT,
                "name": self.name,
                "number": self.number,
                "expected": self.number - 1,  # the state that the writer saw
                "write_id": self.write_id,
                "deleted": not self.revisions,
                "written": self.written,
                "last_revision": self.last_revision,
                "history": [list(told) for told in self.history],
                "revisions": revisions,
            }
        )

    @staticmethod
    def from_json(data: bytes, name: str, number: int) -> NameState:
        """Raises StoredAdapterDamaged for anything but the state of this name and number."""
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
                f"the catalogue's object for adapter {name!r} is damaged, or of another version of "
                "loraplex"
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


def content_to_json(content: Content) -> dict[str, JsonValue]:
    return {
        "digest": content.digest,
        "family": content.family.value,
        "ranks": list(content.ranks),
        "disk_bytes": content.disk_bytes,
        "host_bytes": content.host_bytes,
        "base_fingerprint": content.base_fingerprint,
        "plan_sha256": content.plan_sha256,
        "task": None if content.task is None else content.task.value,
        "upload": content.upload,
    }


def content_from_json(value: Mapping[str, Any]) -> Content:
    """Raises ValueError, KeyError or TypeError."""
    task = value["task"]
    return Content(
        digest=str(value["digest"]),
        family=Family(value["family"]),
        ranks=tuple(int(rank) for rank in value["ranks"]),
        disk_bytes=int(value["disk_bytes"]),
        host_bytes=int(value["host_bytes"]),
        base_fingerprint=str(value["base_fingerprint"]),
        plan_sha256=str(value["plan_sha256"]),
        task=None if task is None else HeadTask(task),
        upload=str(value["upload"]),
    )


def _record_to_json(record: NameRecord) -> dict[str, JsonValue]:
    return {
        "revision": record.revision,
        "digest": record.digest,
        "description": record.description,
        "examples": list(record.examples),
        "provenance": dict(record.provenance),
        "created": record.created,
        "pinned": record.pinned,
        "expires": record.expires,
        "defaults": dict(record.defaults),
        "edits": record.edits,
    }


def _record_from_json(name: str, value: Mapping[str, Any]) -> NameRecord:
    description, expires = value["description"], value["expires"]
    return NameRecord(
        name=name,
        revision=int(value["revision"]),
        digest=str(value["digest"]),
        description=None if description is None else str(description),
        examples=tuple(str(example) for example in value["examples"]),
        provenance=dict(value["provenance"]),
        created=float(value["created"]),
        pinned=bool(value["pinned"]),
        expires=None if expires is None else float(expires),
        defaults=dict(value["defaults"]),
        edits=int(value["edits"]),
    )
