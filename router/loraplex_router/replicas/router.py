"""The policy with its memory: what a gateway keeps between two requests."""

from __future__ import annotations

from collections.abc import Sequence

from .demand import DemandMeter, n_homes
from .policy import choose, rank
from .snapshot import ReplicaSnapshot

__all__ = ["ReplicaRouter"]


class ReplicaRouter:
    """One for each gateway. Not thread-safe; no call blocks."""

    def __init__(self) -> None:
        self._demand = DemandMeter()

    def rank(
        self,
        replicas: Sequence[ReplicaSnapshot],
        digests: tuple[str, ...],  # () = the base model; several = a mixture
        prompt_hash: int,
        now_s: float,  # of any clock that does not go back
    ) -> list[ReplicaSnapshot]:
        """Counts the request and gives the order in which to try the replicas."""
        homes = self._n_homes(replicas, digests, now_s)
        return rank(replicas, digests, prompt_hash, n_homes=homes)

    def choose(
        self,
        replicas: Sequence[ReplicaSnapshot],
        digests: tuple[str, ...],
        prompt_hash: int,
        now_s: float,
    ) -> ReplicaSnapshot | None:
        """The first of `rank`, for callers that try no other; None without replicas."""
        homes = self._n_homes(replicas, digests, now_s)
        return choose(replicas, digests, prompt_hash, n_homes=homes)

    def _n_homes(
        self, replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...], now_s: float
    ) -> int:
        key = ",".join(sorted(digests))
        self._demand.record(key, now_s)
        return n_homes(self._demand.share(key, now_s), replicas, digests)
