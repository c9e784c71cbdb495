"""Which replica gets a request. A pure function of what is known.

An adapter has *homes*: as many replicas as its share of the demand needs (`demand.n_homes`), those
that hold it first, then by rendezvous hashing. A request goes to the first of these classes that
has a replica:

0. a home within the load bound. Equal prompts meet on the same one, for its prefix cache.
1. another replica within the bound that takes the adapter without evicting anything.
2. a home that evicts nothing, within the wider bound of homes: a short wait there is better than an
   eviction elsewhere, so one burst neither copies a cold adapter nor throws a warm one out.
3. any replica within the bound, though something has to leave its device.
4. the least loaded.

A bound is a share of the mean load, as in consistent hashing with bounded loads (Mirrokni, Thorup,
Zadimoghaddam 2018), and at least one request above it, so that idle fleets keep their affinity. No
replica over its bound gets a request while one within its bound exists.

The base model, and ``auto`` before it is resolved, need no adapter: every replica is a home, and
equal prompts meet. A mixture needs several adapters and is placed as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest
from operator import mul
from typing import NamedTuple

from .snapshot import ReplicaSnapshot

__all__ = ["UNKNOWN_PROMPT", "choose", "load_bounds", "rank"]

SLACK = 1.25  # × the mean load, for every replica
HOME_PATIENCE = 0.25  # of a home's places on top, before another replica evicts for its request
UNKNOWN_PROMPT = 0  # a prompt hash that says nothing: the least loaded home is as good as any


class LoadBounds(NamedTuple):
    """In pending requests per place."""

    any: float
    home: float


def choose(
    replicas: Sequence[ReplicaSnapshot],
    digests: tuple[str, ...],  # () = the base model
    prompt_hash: int,  # of the prompt's first block: equal prefixes go to equal caches
    *,
    n_homes: int = 1,
) -> ReplicaSnapshot | None:
    """The first of `rank`, found sooner; None when there is no replica."""
    if not replicas:
        return None
    homes = _homes_on_device(replicas, digests, n_homes) or _cold_home(replicas, digests, n_homes)
    bound = load_bounds(replicas).any
    free = [replica for replica in homes if replica.load <= bound]
    key = _key_of(digests)
    if free and prompt_hash == UNKNOWN_PROMPT:
        return min(free, key=lambda r: (r.load, _by_hash(key, r)))
    if free:
        return min(free, key=lambda r: _by_hash(key ^ prompt_hash, r))
    return replicas[min(_keyed(replicas, digests, prompt_hash, n_homes))[-1]]


def rank(
    replicas: Sequence[ReplicaSnapshot],
    digests: tuple[str, ...],
    prompt_hash: int,
    *,
    n_homes: int = 1,
) -> list[ReplicaSnapshot]:
    """All replicas, best first: the order in which to try them."""
    if not replicas:
        return []
    return [replicas[key[-1]] for key in sorted(_keyed(replicas, digests, prompt_hash, n_homes))]


def _homes_on_device(
    replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...], n_homes: int
) -> Sequence[ReplicaSnapshot]:
    """All homes if each of them holds the adapters; else none."""
    holders = [replica for replica in replicas if replica.device.issuperset(digests)]
    if len(holders) < n_homes:
        return ()
    key = _key_of(digests)
    return nsmallest(n_homes, holders, key=lambda r: _by_hash(key, r)) if digests else holders


def _cold_home(
    replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...], n_homes: int
) -> Sequence[ReplicaSnapshot]:
    """The home of an adapter that has only one and is in host memory somewhere, or nowhere."""
    if n_homes > 1 or len(digests) > 1:
        return ()
    near = [replica for replica in replicas if replica.host.issuperset(digests)]
    if not near:
        n_bytes = _known_bytes(replicas, digests)
        near = [r for r in replicas if r.n_free_slots > 0 and r.has_room(digests, n_bytes)]
    near = near or [replica for replica in replicas if replica.n_evictable > 0] or list(replicas)
    key = _key_of(digests)
    return (min(near, key=lambda r: _by_hash(key, r)),)


def load_bounds(replicas: Sequence[ReplicaSnapshot]) -> LoadBounds:
    """Of this fleet with one more request in it. ``replicas`` is not empty."""
    return _bounds([r.load for r in replicas], [max(1, r.capacity) for r in replicas])


def _bounds(loads: Sequence[float], capacities: Sequence[int]) -> LoadBounds:
    n_places = sum(capacities)
    mean = (sum(map(mul, loads, capacities)) + 1) / n_places
    one_place = len(loads) / n_places
    bound = max(SLACK * mean, mean + one_place)
    return LoadBounds(any=bound, home=bound + HOME_PATIENCE)


_Key = tuple[int, float, int, int, str, int]  # smaller is better; the last is the replica's index


def _keyed(
    replicas: Sequence[ReplicaSnapshot], digests: tuple[str, ...], prompt_hash: int, n_homes: int
) -> list[_Key]:
    loads = [replica.load for replica in replicas]
    bounds = _bounds(loads, [max(1, replica.capacity) for replica in replicas])
    n_bytes = _known_bytes(replicas, digests)
    key_of_set = _key_of(digests)
    places = [
        (r.location(digests, n_bytes), *_by_hash(key_of_set, r), i) for i, r in enumerate(replicas)
    ]
    homes = {place[-1] for place in nsmallest(max(1, n_homes), places)}
    if not digests:
        homes = set(range(len(replicas)))
    # Which of several homes: prompts of one adapter meet, those of different ones need not.
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
    """What ``digests`` take on a device, as far as a replica that holds them tells; else 0."""
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
    """Rendezvous weight: 64 bits of (key, replica), by the finaliser of splitmix64."""
    x = (key ^ _hash64(replica_id)) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
