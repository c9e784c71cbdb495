"""Reports of the store on an adapter, a deletion and the store itself. JSON-ready values."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from loraplex_adapter_store.plan import Family, HeadTask
from loraplex_adapter_store.report import JsonValue, LoadReport, json_fields
from loraplex_adapter_store.tiers.host_tier import HostTierStats

from .name_record import NameRecord


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Sizes of an adapter on disk (its files) and in host memory (its plan, 0 if not loaded)."""

    disk: int
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard(NameRecord):
    """A revision of a name, and what the store knows of its content."""

    family: Family
    ranks: tuple[int, ...]  # distinct ranks, ascending
    n_bytes: TierBytes
    base_fingerprint: str
    n_leases: int
    report: LoadReport | None  # None in lists
    unservable: str | None = None  # why this server cannot apply the adapter; None: it can
    task: HeadTask | None = None  # of a classifier; None: the adapter generates text
    last_load_s: float | None = None  # the last load from disk to host memory
    replaced: str | None = None  # after a put: the previous digest; None: the name is new

    def to_json(self) -> dict[str, JsonValue]:
        whole = json_fields(self)
        for name in ("edits", "last_load_s", "replaced"):
            del whole[name]
        whole["n_bytes"] = asdict(self.n_bytes)
        whole["report"] = None if self.report is None else self.report.to_json()
        return whole


class CardEdit(NamedTuple):
    """The fields of a card that an edit replaces."""

    description: str | None
    examples: Sequence[str]
    defaults: Mapping[str, JsonValue]
    provenance: Mapping[str, JsonValue] | None = None  # None: unchanged


@dataclass(frozen=True, slots=True)
class DeleteReport:
    """The result of a deletion. Not ``drained``: leases outlived the timeout and keep the bytes."""

    name: str
    digest: str
    drained: bool
    n_leases_waited: int
    n_bytes_freed: TierBytes

    def to_json(self) -> dict[str, JsonValue]:
        return asdict(self)


class PlanSize(NamedTuple):
    n_bytes: int
    rank: int  # the largest; 0 for a mixture


@dataclass(frozen=True, slots=True)
class StoreStats(HostTierStats):
    n_adapters: int
    n_digests: int
    disk_bytes: int
