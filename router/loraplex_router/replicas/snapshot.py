"""The policy's picture of a replica, as old as the replica's last report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

RANKS_PER_ROW = 288
"""Rank rows that cost a step about as much as one more row of the base: half of the default base's
hidden size. A product with a [out, in] weight takes out × in multiplications for a row, its
factors r × (in + out); with in = out = h they are equal at r = h / 2."""


class AdapterLocation(IntEnum):
    """The distance of a replica from serving an adapter; smaller is nearer."""

    DEVICE = 0  # in the device pool; the base model always is
    HOST = 1  # folded in host memory: one copy away
    FREE_SLOT = 2  # unknown to the replica, which has room
    EVICTABLE = 3  # an idle adapter must be evicted first
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
    free_bytes: int | None = None  # of the device pool; None: not reported
    n_pending_ranks: int = 0  # sum of the ranks of the adapters of pending requests
    n_bytes: Mapping[str, int] = field(default_factory=dict)  # of resident adapters, on the device

    @property
    def load(self) -> float:
        """Pending requests per row of a step, ranks included; above 1 requests queue."""
        return (self.n_pending + self.n_pending_ranks / RANKS_PER_ROW) / max(1, self.capacity)

    def location(self, digests: Sequence[str], n_bytes: int = 0) -> AdapterLocation:
        """Return the location of the farthest digest. ``n_bytes``: on the device; 0: unknown."""
        if self.device.issuperset(digests):
            return AdapterLocation.DEVICE
        if self.host.issuperset(self._missing(digests)):
            return AdapterLocation.HOST
        if self.has_room(digests, n_bytes):
            return AdapterLocation.FREE_SLOT
        n_missing = len(self._missing(digests))
        if 0 < self.n_evictable >= n_missing - self.n_free_slots:
            return AdapterLocation.EVICTABLE
        return AdapterLocation.FULL

    def has_room(self, digests: Sequence[str], n_bytes: int = 0) -> bool:
        """Return True if the device can take ``digests`` without an eviction."""
        n_missing = len(self._missing(digests))
        if n_missing == 0:
            return True
        fits = self.free_bytes is None or self.free_bytes >= n_bytes
        return self.n_free_slots >= n_missing and fits

    def _missing(self, digests: Sequence[str]) -> Sequence[str]:
        return [digest for digest in digests if digest not in self.device]

    @staticmethod
    def from_stats(
        replica_id: str, stats: Mapping[str, object], *, n_pending: int | None, capacity: int
    ) -> ReplicaSnapshot:
        """Read the ``routing_stats`` of a replica. A missing or invalid key counts as empty.

        ``n_pending``: by the caller's count; None: the replica's own. ``capacity`` is used if the
        replica reports none: load is measured in rows of a step, not in requests that may be sent.
        """
        free_bytes = stats.get("free_bytes")
        return ReplicaSnapshot(
            replica_id=replica_id,
            n_pending=_count(stats.get("pending")) if n_pending is None else n_pending,
            capacity=_count(stats.get("capacity")) or capacity,
            device=_digests(stats.get("device")),
            host=_digests(stats.get("host")),
            n_free_slots=_count(stats.get("free_slots")),
            n_evictable=_count(stats.get("evictable")),
            free_bytes=_count(free_bytes) if isinstance(free_bytes, int) else None,
            n_pending_ranks=_count(stats.get("pending_ranks")),
            n_bytes=_counts(stats.get("bytes")),
        )


def _digests(value: object) -> frozenset[str]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return frozenset(str(digest) for digest in value)
    return frozenset()


def _count(value: object) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        return {}
    return {str(digest): _count(n) for digest, n in value.items()}
