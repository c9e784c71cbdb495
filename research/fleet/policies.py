"""Our policy and what others do. Each entry makes a fresh one: policies keep state."""

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b

from loraplex_router.replicas.policy import ReplicaRouter
from loraplex_router.replicas.snapshot import ReplicaSnapshot

from .fleet import Policy


class _Loraplex:
    def __init__(self) -> None:
        self._router = ReplicaRouter()

    def __call__(
        self, replicas: Sequence[ReplicaSnapshot], name: str, prompt_hash: int, now_s: float
    ) -> int:
        best = self._router.rank(replicas, (name,), prompt_hash, now_s)[0]
        return int(best.replica_id[1:])


class _PowerOfTwo:
    """Ray Serve's default router with model multiplexing: two of those that hold the model, the
    shorter queue; when all of them are full, two of those with the fewest models."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    def __call__(
        self, replicas: Sequence[ReplicaSnapshot], name: str, prompt_hash: int, now_s: float
    ) -> int:
        pool = [i for i, r in enumerate(replicas) if name in r.device and r.n_pending < r.capacity]
        if not pool:
            fewest = min(len(r.device) for r in replicas)
            pool = [i for i, r in enumerate(replicas) if len(r.device) == fewest]
        two = self._rng.sample(pool, min(2, len(pool)))
        return min(two, key=lambda i: replicas[i].n_pending)


class _ConsistentHash:
    """One home for each adapter, whatever its load."""

    def __call__(
        self, replicas: Sequence[ReplicaSnapshot], name: str, prompt_hash: int, now_s: float
    ) -> int:
        return _jump_hash(name, len(replicas))


class _RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def __call__(
        self, replicas: Sequence[ReplicaSnapshot], name: str, prompt_hash: int, now_s: float
    ) -> int:
        self._next += 1
        return self._next % len(replicas)


POLICIES: dict[str, Callable[[], Policy]] = {
    "loraplex": _Loraplex,
    "power of two": _PowerOfTwo,
    "consistent hash": _ConsistentHash,
    "round robin": _RoundRobin,
}


def _jump_hash(name: str, n: int) -> int:
    """Lamping and Veach 2014: a consistent hash onto 0 … n − 1 without a table."""
    key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
    chosen, candidate = 0, 0
    while candidate < n:
        chosen = candidate
        key = (key * 2862933555777941757 + 1) & 0xFFFFFFFFFFFFFFFF
        candidate = int((chosen + 1) * (1 << 31) / ((key >> 33) + 1))
    return chosen
