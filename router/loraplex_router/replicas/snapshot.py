"""What the policy knows of a replica: a frozen picture, as old as its last report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["AdapterLocation", "ReplicaSnapshot"]


class AdapterLocation(IntEnum):
    """How near a replica is to serving an adapter; smaller is nearer."""

    DEVICE = 0  # its factors lie in the device pool (the base model always does)
    HOST = 1  # folded in host memory: one copy away
    FREE_SLOT = 2  # unknown there, but there is room for it
    EVICTABLE = 3  # something idle has to leave first
    FULL = 4  # every resident adapter is in use: the request would wait for one to finish


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    replica_id: str
    n_pending: int  # requests running or queued there
    capacity: int  # requests it runs at once
    device: frozenset[str] = frozenset()  # digests
    host: frozenset[str] = frozenset()
    n_free_slots: int = 0
    n_evictable: int = 0  # resident adapters without a running request

    @property
    def load(self) -> float:
        """Pending requests per place; above 1 requests queue."""
        return self.n_pending / max(1, self.capacity)

    def location(self, adapter_digest: str | None) -> AdapterLocation:
        if adapter_digest is None or adapter_digest in self.device:
            return AdapterLocation.DEVICE
        if adapter_digest in self.host:
            return AdapterLocation.HOST
        if self.n_free_slots > 0:
            return AdapterLocation.FREE_SLOT
        return AdapterLocation.EVICTABLE if self.n_evictable > 0 else AdapterLocation.FULL

    @staticmethod
    def from_stats(
        replica_id: str, stats: Mapping[str, object], *, n_pending: int, capacity: int
    ) -> ReplicaSnapshot:
        """Reads the ``routing_stats`` a replica reports. A missing or odd key counts as empty."""
        return ReplicaSnapshot(
            replica_id=replica_id,
            n_pending=n_pending,
            capacity=capacity,
            device=_digests(stats.get("device")),
            host=_digests(stats.get("host")),
            n_free_slots=_count(stats.get("free_slots")),
            n_evictable=_count(stats.get("evictable")),
        )


def _digests(value: object) -> frozenset[str]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return frozenset(str(digest) for digest in value)
    return frozenset()


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0
