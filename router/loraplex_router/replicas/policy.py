"""Which replica gets a request. A pure function of what is known.

Order: first the replicas that are not overloaded, then the nearest location of the adapter, then
consistent hashing. "Overloaded" is a bound, not a comparison: a replica may carry ``slack`` times
the mean load plus a little, as in consistent hashing with bounded loads. So an adapter stays where
it is while its replica copes; when it does not, the request spills to the next best, which then
holds the adapter too. Hot adapters replicate by themselves, cold ones keep one home.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from .snapshot import AdapterLocation, ReplicaSnapshot

__all__ = ["Choice", "choose", "rank"]

DEFAULT_SLACK = 1.25


class Choice(NamedTuple):
    replica_id: str
    location: AdapterLocation  # where the adapter is on that replica
    spilled: bool  # a nearer replica exists but is overloaded


def choose(
    replicas: Sequence[ReplicaSnapshot],
    adapter_digest: str | None,  # None = the base model
    prompt_hash: int,  # of the prompt's first block: equal prefixes go to equal caches
    *,
    slack: float = DEFAULT_SLACK,
) -> Choice | None:
    """The best replica, or None when there is none. Independent of the order of ``replicas``."""
    ranked = rank(replicas, adapter_digest, prompt_hash, slack=slack)
    if not ranked:
        return None
    best = ranked[0]
    nearest = min(r.location(adapter_digest) for r in replicas)
    location = best.location(adapter_digest)
    return Choice(best.replica_id, location, spilled=location > nearest)


def rank(
    replicas: Sequence[ReplicaSnapshot],
    adapter_digest: str | None,
    prompt_hash: int,
    *,
    slack: float = DEFAULT_SLACK,
) -> list[ReplicaSnapshot]:
    """All replicas, best first: the order in which to try them."""
    if not replicas:
        return []
    bound = _load_bound(replicas, slack)

    def key(replica: ReplicaSnapshot) -> tuple[bool, float, AdapterLocation, int, str]:
        overloaded = replica.load > bound
        location = replica.location(adapter_digest)
        # Holders differ in their prefix caches; for the others the adapter should have one home.
        home = str(prompt_hash) if location is AdapterLocation.DEVICE else (adapter_digest or "")
        hashed = _rendezvous(home, replica.replica_id)
        return (
            overloaded,
            replica.load if overloaded else 0.0,
            location,
            -hashed,
            replica.replica_id,
        )

    return sorted(replicas, key=key)


def _load_bound(replicas: Sequence[ReplicaSnapshot], slack: float) -> float:
    """``slack`` × mean, and at least one place above it, so that idle fleets keep affinity."""
    n_places = sum(max(1, r.capacity) for r in replicas)
    mean = (sum(r.n_pending for r in replicas) + 1) / n_places
    one_place = len(replicas) / n_places
    return max(slack * mean, mean + one_place)


def _rendezvous(key: str, replica_id: str) -> int:
    digest = blake2b(f"{key}\0{replica_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
