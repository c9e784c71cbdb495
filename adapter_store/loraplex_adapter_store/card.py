"""What the store tells about an adapter, a deletion and itself. Plain values, JSON-ready."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .plan import Family, HeadTask
from .report import JsonValue, LoadReport

__all__ = ["AdapterCard", "CardEdit", "DeleteReport", "PlanSize", "StoreStats", "TierBytes"]


@dataclass(frozen=True, slots=True)
class TierBytes:
    """``disk``: the files. ``host``: the folded plan, 0 while it is not in memory."""

    disk: int
    host: int


@dataclass(frozen=True, slots=True)
class AdapterCard:
    name: str
    digest: str  # sha256, hex: the ETag of the name
    revision: int  # 1 for the first content of this name, never reused
    family: Family
    description: str | None
    examples: tuple[str, ...]
    ranks: tuple[int, ...]  # distinct ranks, ascending
    n_bytes: TierBytes
    created: float  # seconds since the epoch, of this revision
    base_fingerprint: str
    pinned: bool
    n_leases: int
    report: LoadReport | None  # None in lists: ask for the adapter alone
    provenance: Mapping[str, JsonValue] = field(default_factory=dict)
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)  # of requests
    etag: str = ""  # of content and card, for a change of what was seen
    expires: float | None = None  # seconds since the epoch; None: it stays
    unservable: str | None = None  # why this server's engine cannot apply it; None: it can
    task: HeadTask | None = None  # what it labels; None: it generates text
    last_load_s: float | None = None  # from disk to host, the last time; None: not yet
    replaced: str | None = None  # after a put: the digest the name had before it; None: it is new

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "name": self.name,
            "digest": self.digest,
            "revision": self.revision,
            "family": self.family.value,
            "description": self.description,
            "examples": list(self.examples),
            "ranks": list(self.ranks),
            "n_bytes": {"disk": self.n_bytes.disk, "host": self.n_bytes.host},
            "created": self.created,
            "base_fingerprint": self.base_fingerprint,
            "pinned": self.pinned,
            "n_leases": self.n_leases,
            "report": None if self.report is None else self.report.to_json(),
            "provenance": dict(self.provenance),
            "defaults": dict(self.defaults),
            "expires": self.expires,
            "unservable": self.unservable,
            "task": None if self.task is None else self.task.value,
        }


class CardEdit(NamedTuple):
    """What of a card can change."""

    description: str | None
    examples: Sequence[str]
    defaults: Mapping[str, JsonValue]
    provenance: Mapping[str, JsonValue] | None = None  # None: as it is


@dataclass(frozen=True, slots=True)
class DeleteReport:
    """``drained`` is False when leases outlived the timeout; their bytes go with the last one."""

    name: str
    digest: str
    drained: bool
    n_leases_waited: int
    n_bytes_freed: TierBytes

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "name": self.name,
            "digest": self.digest,
            "drained": self.drained,
            "n_leases_waited": self.n_leases_waited,
            "n_bytes_freed": {"disk": self.n_bytes_freed.disk, "host": self.n_bytes_freed.host},
        }


class PlanSize(NamedTuple):
    n_bytes: int
    rank: int  # the largest; 0: none, or a mixture


@dataclass(frozen=True, slots=True)
class StoreStats:
    n_adapters: int
    n_digests: int
    n_leases: int
    disk_bytes: int
    host_bytes_used: int
    host_bytes_total: int
    n_host_plans: int
    n_host_hits: int
    n_host_loads: int
    n_host_evictions: int
    load_seconds: float  # sum over all host loads

    def to_json(self) -> dict[str, JsonValue]:
        return dataclasses.asdict(self)
