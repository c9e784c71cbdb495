"""How much each adapter is asked for, and how many replicas that is worth.

Shares need no agreement between gateways: each sees a sample of the same traffic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .snapshot import ReplicaSnapshot

__all__ = ["DemandMeter", "n_homes"]

TARGET_LOAD = 0.7  # of a home's places; a fleet below it keeps fewer copies
MOST_COPIES = 1.5  # × the proportional share, however long the queues are
HYSTERESIS = 1.5  # a copy goes only when demand has fallen by a third

_FORGET_BELOW = 1e-3  # of a request
_MIN_SWEEP = 1024


class DemandMeter:
    """Exponentially decayed requests by key. Owned by one router; not thread-safe.

    A key is an adapter's digest, or those of a mixture joined. Time never goes back.
    """

    def __init__(self, half_life_s: float = 60.0) -> None:
        self._decay = math.log(2) / half_life_s
        self._requests: dict[str, tuple[float, float]] = {}  # key → (weight, when)
        self._total = (0.0, 0.0)
        self._sweep_at = _MIN_SWEEP

    def record(self, key: str, now_s: float) -> None:
        """Counts one request. The base counts too, as ``""``: it takes its part of the fleet."""
        self._requests[key] = (self._weight(self._requests.get(key), now_s) + 1.0, now_s)
        self._total = (self._weight(self._total, now_s) + 1.0, now_s)
        if len(self._requests) > self._sweep_at:
            self._forget(now_s)

    def share(self, key: str, now_s: float) -> float:
        """Of all recent requests, 0 to 1, one standard error of a count below the estimate.

        So a one-off has no share, and few requests make none look hot.
        """
        total = self._weight(self._total, now_s)
        weight = self._weight(self._requests.get(key), now_s)
        return max(0.0, weight - math.sqrt(weight)) / total if total else 0.0

    def _weight(self, counted: tuple[float, float] | None, now_s: float) -> float:
        if counted is None:
            return 0.0
        weight, at = counted
        return weight * math.exp(-self._decay * max(0.0, now_s - at))

    def _forget(self, now_s: float) -> None:
        """Drops the keys that nobody asks for any more; amortised over as many new ones."""
        self._requests = {
            key: counted
            for key, counted in self._requests.items()
            if self._weight(counted, now_s) > _FORGET_BELOW
        }
        self._sweep_at = max(_MIN_SWEEP, 2 * len(self._requests))


def n_homes(share: float, replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...]) -> int:
    """How many replicas should serve ``digests``, with ``share`` of the demand.

    Between what the demand needs and `HYSTERESIS` times that, the copies that exist stay as many.
    At least 1, at most all.
    """
    n = len(replicas)
    if HYSTERESIS * share * n * MOST_COPIES <= 1:
        return 1  # cold, or no replicas
    n_holders = sum(1 for replica in replicas if replica.device.issuperset(digests))
    mean_load = sum(replica.load for replica in replicas) / n
    needed = share * n * min(MOST_COPIES, mean_load / TARGET_LOAD)
    least, most = math.ceil(needed), math.ceil(HYSTERESIS * needed)
    return min(n, max(1, least, min(n_holders, most)))
