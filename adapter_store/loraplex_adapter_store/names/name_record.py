"""The content and the card of a name, and the conditions of a change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_adapter_store.errors import RevisionConflict, UnknownAdapter
from loraplex_adapter_store.plan import Family, HeadTask
from loraplex_adapter_store.report import JsonValue


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
    upload: str = ""  # the name's copy in a catalogue; empty without a catalogue


@dataclass(frozen=True, slots=True)
class NameRecord:
    """A revision of a name: the current one, or an older one that is kept."""

    name: str
    revision: int  # 1 for the first content of the name, never reused
    digest: str  # sha256 of the content, hex
    description: str | None
    examples: tuple[str, ...]
    provenance: Mapping[str, JsonValue]
    created: float  # seconds since the epoch, of this revision
    pinned: bool = False  # of the name, not of the revision; so is ``expires``
    expires: float | None = None  # seconds since the epoch; None: never
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)  # for requests
    edits: int = 0  # changes of the card since the content was put

    @property
    def etag(self) -> str:
        """The identity of content and card, for ``if_match``: the digest of an unchanged card."""
        return f"{self.digest}.{self.edits}" if self.edits else self.digest

    def matches(self, if_match: str) -> bool:
        """Compare with the ETag, or with the digest for the content only."""
        return if_match in (self.digest, self.etag)


def check_match(name: str, current: NameRecord | None, if_match: str | None, replace: bool) -> None:
    """Raises RevisionConflict if ``name`` may not move. ``replace`` False: it must be new."""
    if if_match is not None and (current is None or not current.matches(if_match)):
        now = "does not exist" if current is None else f"has digest {current.etag}"
        raise RevisionConflict(f"adapter {name!r} {now}, not {if_match}", current)
    if not replace and current is not None:
        raise RevisionConflict(
            f"adapter {name!r} exists already (digest {current.digest})", current
        )


def check_unchanged(current: NameRecord, if_match: str | None) -> None:
    """Raises RevisionConflict if the card has changed since ``if_match``."""
    if if_match is not None and if_match != current.etag:
        raise RevisionConflict(
            f"adapter {current.name!r} has ETag {current.etag}, not {if_match}", current
        )


def check_expired(current: NameRecord, by: float | None) -> None:
    """Raises UnknownAdapter if ``by`` is given and the name does not expire by that time."""
    if by is not None and (current.expires is None or current.expires > by):
        raise UnknownAdapter(current.name)
