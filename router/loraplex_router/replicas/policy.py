"""The order in which a request tries the replicas, from their snapshots and recent demand.

An adapter has *homes*: as many replicas as its share of the demand needs (`n_homes`),
replicas that hold the adapter first, then by rendezvous hashing. The classes, best first:

0. A home within the load bound. Equal prompts go to the same home, for its prefix cache.
1. Another replica within the bound that takes the adapter without an eviction.
2. A home without an eviction, within the wider bound of homes. A short wait there is better than an
   eviction elsewhere: one burst neither copies a cold adapter nor evicts a warm one.
3. Any replica within the bound, with an eviction.
4. The least loaded replica.

A bound is a share of the mean load, as in consistent hashing with bounded loads (Mirrokni, Thorup,
Zadimoghaddam 2018), and at least one request above the mean, so that idle fleets keep their
affinity. No replica over its bound gets a request while another is within its bound.

The base model needs no adapter: every replica is a home. A mixture is placed as one adapter.
Gateways need not agree on the demand: each sees a sample of the same traffic.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest
from operator import mul
from typing import NamedTuple

from .snapshot import ReplicaSnapshot

SLACK = 1.25  # × the mean load, for every replica
HOME_PATIENCE = 0.25  # more for a home, before another replica evicts for the request
UNKNOWN_PROMPT = 0  # no prompt hash: the least loaded home is best
_Key = tuple[int, float, int, int, str, int]  # smaller is better; the last is the replica's index
TARGET_LOAD = 0.7  # load of one copy; a fleet with less load keeps fewer copies
MOST_COPIES = 1.5  # × the proportional share, however long the queues are
HYSTERESIS = 1.5  # a copy is dropped only when demand has fallen by a third
_FORGET_BELOW = 1e-3  # of a request
_MIN_SWEEP = 1024


class LoadBounds(NamedTuple):
    """Largest loads, in pending requests per row of a step."""

    any: float
    home: float


def rank(
    replicas: Sequence[ReplicaSnapshot],
    digests: tuple[str, ...],  # () = the base model
    prompt_hash: int,  # of the prompt's first block: equal prefixes go to equal caches
    *,
    n_homes: int = 1,
) -> list[ReplicaSnapshot]:
    """Return all replicas, best first."""
    if not replicas:
        return []
    return [replicas[key[-1]] for key in sorted(_keyed(replicas, digests, prompt_hash, n_homes))]


def load_bounds(loads: Sequence[float], capacities: Sequence[int]) -> LoadBounds:
    """Return the bounds of a non-empty fleet, for one more request."""
    n_places = sum(capacities)
    mean = (sum(map(mul, loads, capacities)) + 1) / n_places
    one_place = len(loads) / n_places
    bound = max(SLACK * mean, mean + one_place)
    return LoadBounds(any=bound, home=bound + HOME_PATIENCE)


def _keyed(
    replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...], prompt_hash: int, n_homes: int
) -> list[_Key]:
    loads = [replica.load for replica in replicas]
    bounds = load_bounds(loads, [max(1, replica.capacity) for replica in replicas])
    n_bytes = _known_bytes(replicas, digests)
    key_of_set = _key_of(digests)
    places = [
        (r.location(digests, n_bytes), *_by_hash(key_of_set, r), i) for i, r in enumerate(replicas)
    ]
    homes = {place[-1] for place in nsmallest(max(1, n_homes), places)}
    if not digests:
        homes = set(range(len(replicas)))
    # Among several homes, equal prompts of one adapter go to the same home.
    key_of_prompt = prompt_hash ^ key_of_set
    keys: list[_Key] = []
    for location, hashed, replica_id, i in places:
        load = loads[i]
        evicts = not replicas[i].has_room(digests, n_bytes)
        if load <= bounds.any:
            if i in homes:
                if prompt_hash == UNKNOWN_PROMPT:
                    key = (0, load, 0, hashed, replica_id, i)
                else:
                    key = (0, 0.0, 0, -_mixed(key_of_prompt, replica_id), replica_id, i)
            else:
                key = (3 if evicts else 1, 0.0, location, hashed, replica_id, i)
        elif load <= bounds.home and i in homes and not evicts:
            key = (2, load, 0, hashed, replica_id, i)
        else:
            key = (4, load, 0, hashed, replica_id, i)
        keys.append(key)
    return keys


def _known_bytes(replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...]) -> int:
    """Return the device bytes of ``digests``, as far as a replica reports them."""
    known = 0
    for digest in digests:
        for replica in replicas:
            if digest in replica.n_bytes:
                known += replica.n_bytes[digest]
                break
    return known


def _by_hash(key: int, replica: ReplicaSnapshot) -> tuple[int, str]:
    return -_mixed(key, replica.replica_id), replica.replica_id


def _key_of(digests: tuple[str, ...]) -> int:
    return _hash64(",".join(sorted(digests)))


@lru_cache(maxsize=1 << 16)
def _hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(key: int, replica_id: str) -> int:
    """Return a rendezvous weight: 64 bits of (key, replica), by splitmix64's finaliser."""
    x = (key ^ _hash64(replica_id)) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


class ReplicaRouter:
    """Ranks the replicas of one gateway. Not thread-safe; no call blocks."""

    def __init__(self) -> None:
        self._demand = DemandMeter()

    def rank(
        self,
        replicas: Sequence[ReplicaSnapshot],
        digests: tuple[str, ...],  # () = the base model; several = a mixture
        prompt_hash: int,
        now_s: float,  # of any clock that does not go back
    ) -> list[ReplicaSnapshot]:
        """Count the request, and return the replicas in the order in which to try them."""
        key = ",".join(sorted(digests))
        self._demand.record(key, now_s)
        homes = n_homes(self._demand.share(key, now_s), replicas, digests)
        return rank(replicas, digests, prompt_hash, n_homes=homes)


class DemandMeter:
    """Counts requests by key, with exponential decay. Owned by one router; not thread-safe.

    A key is an adapter's digest, or the joined digests of a mixture. ``now_s`` must not decrease.
    """

    def __init__(self, half_life_s: float = 60.0) -> None:
        self._decay = math.log(2) / half_life_s
        self._requests: dict[str, tuple[float, float]] = {}  # key → (weight, when)
        self._total = (0.0, 0.0)
        self._sweep_at = _MIN_SWEEP

    def record(self, key: str, now_s: float) -> None:
        """Count one request. The base counts too, as ``""``."""
        self._requests[key] = (self._weight(self._requests.get(key), now_s) + 1.0, now_s)
        self._total = (self._weight(self._total, now_s) + 1.0, now_s)
        if len(self._requests) > self._sweep_at:
            self._forget(now_s)

    def share(self, key: str, now_s: float) -> float:
        """Return the share of recent requests, 0 to 1, less one standard error of the count.

        With this margin a single request has no share, and few requests do not look like demand.
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
        """Drop the keys without recent requests. Runs once for as many new keys."""
        self._requests = {
            key: counted
            for key, counted in self._requests.items()
            if self._weight(counted, now_s) > _FORGET_BELOW
        }
        self._sweep_at = max(_MIN_SWEEP, 2 * len(self._requests))


def n_homes(share: float, replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...]) -> int:
    """Return the number of replicas that should serve ``digests``, from 1 to all.

    ``share``: of the demand. The number of copies stays as it is between the number that the demand
    needs and `HYSTERESIS` times that.
    """
    n = len(replicas)
    if HYSTERESIS * share * n * MOST_COPIES <= 1:
        return 1  # cold, or no replicas
    n_holders = sum(1 for replica in replicas if replica.device.issuperset(digests))
    mean_load = sum(replica.load for replica in replicas) / n
    needed = share * n * min(MOST_COPIES, mean_load / TARGET_LOAD)
    least, most = math.ceil(needed), math.ceil(HYSTERESIS * needed)
    return min(n, max(1, least, min(n_holders, most)))
