"""What a name points at, and when it may be pointed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import RevisionConflict, UnknownAdapter
from .plan import Family, HeadTask
from .report import JsonValue

__all__ = ["Content", "NameRecord", "Put", "check_expired", "check_match", "check_unchanged"]


@dataclass(frozen=True, slots=True)
class Content:
    digest: str
    family: Family
    ranks: tuple[int, ...]
    disk_bytes: int
    host_bytes: int
    base_fingerprint: str
    plan_sha256: str  # of the packed plan's file
    task: HeadTask | None = None  # of a classifier
    upload: str = ""  # which copy of a catalogue's; empty without a catalogue


@dataclass(frozen=True, slots=True)
class NameRecord:
    """A revision of a name: the one it points at now, or an older one that is kept."""

    name: str
    revision: int
    digest: str
    description: str | None
    examples: tuple[str, ...]
    provenance: Mapping[str, JsonValue]
    created: float
    pinned: bool = False  # of the name, not of the revision, like the next
    expires: float | None = None  # seconds since the epoch; None: it stays
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)  # of requests; for the server
    edits: int = 0  # changes of the card since the content was put

    @property
    def etag(self) -> str:
        """Of content and card; the digest alone while the card is as it was put."""
        return f"{self.digest}.{self.edits}" if self.edits else self.digest

    def matches(self, if_match: str) -> bool:
        """A digest alone compares the content only."""
        return if_match in (self.digest, self.etag)


class Put(NamedTuple):
    """What a put has made of a name."""

    record: NameRecord  # that the name points at now
    kept: tuple[NameRecord, ...]  # older revisions, newest first
    previous: NameRecord | None  # what the name pointed at; None: it is new


def check_match(name: str, current: NameRecord | None, if_match: str | None, replace: bool) -> None:
    """Raises RevisionConflict where ``name`` may not move. ``replace`` False: it must be new."""
    if if_match is not None and (current is None or not current.matches(if_match)):
        now = "does not exist" if current is None else f"has digest {current.etag}"
        raise RevisionConflict(f"adapter {name!r} {now}, not {if_match}", current)
    if not replace and current is not None:
        raise RevisionConflict(
            f"adapter {name!r} exists already (digest {current.digest})", current
        )


def check_unchanged(current: NameRecord, if_match: str | None) -> None:
    """Raises RevisionConflict if the card is not the one that was seen."""
    if if_match is not None and if_match != current.etag:
        raise RevisionConflict(
            f"adapter {current.name!r} has ETag {current.etag}, not {if_match}", current
        )


def check_expired(current: NameRecord, by: float | None) -> None:
    """Raises UnknownAdapter if there is a time ``by`` and the name lives on after it."""
    if by is not None and (current.expires is None or current.expires > by):
        raise UnknownAdapter(current.name)
