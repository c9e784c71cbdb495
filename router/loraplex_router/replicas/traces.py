"""Synthetic traffic: Zipf popularity, drifting popularity, a lost replica."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from .policy import choose
from .router import ReplicaRouter
from .simulator import Arrival, Policy, random_service
from .snapshot import ReplicaSnapshot

__all__ = ["POLICIES", "TRACES", "drift", "replica_loss", "zipf"]


def zipf(
    *,
    n_requests: int = 20_000,
    n_adapters: int = 400,
    exponent: float = 1.0,
    rate_per_s: float = 90.0,
    mean_service_s: float = 1.0,
    n_prefixes: int = 32,
    seed: int = 0,
    drift_every_s: float | None = None,
) -> list[Arrival]:
    """Poisson arrivals; the popularity of adapters falls as rank^-exponent.

    With ``drift_every_s`` a tenth of the adapters change places in the ranking each period.
    """
    rng = random.Random(seed)
    names = [f"a{i:04d}" for i in range(n_adapters)]
    weights = list(
        itertools.accumulate(1.0 / (rank**exponent) for rank in range(1, n_adapters + 1))
    )
    now, next_drift = 0.0, drift_every_s
    trace = []
    for _ in range(n_requests):
        now += rng.expovariate(rate_per_s)
        if next_drift is not None and drift_every_s is not None and now >= next_drift:
            _shuffle_some(rng, names)
            next_drift += drift_every_s
        adapter = rng.choices(names, cum_weights=weights)[0]
        service_s = random_service(rng, mean_service_s)
        trace.append(Arrival(now, adapter, rng.randrange(n_prefixes), service_s))
    return trace


def drift(*, seed: int = 0, n_requests: int = 20_000) -> list[Arrival]:
    return zipf(seed=seed, n_requests=n_requests, drift_every_s=5.0)


def replica_loss(*, seed: int = 0, n_requests: int = 20_000) -> list[Arrival]:
    """One replica of the fleet is lost at a third of the time and comes back, empty, at two."""
    trace = zipf(seed=seed, n_requests=n_requests)
    end = trace[-1].time_s
    lost = Arrival(end / 3, "", 0, 0.0, kills="r3")
    back = Arrival(2 * end / 3, "", 0, 0.0, revives="r3")
    return sorted([*trace, lost, back], key=lambda arrival: arrival.time_s)


def _shuffle_some(rng: random.Random, names: list[str]) -> None:
    places = rng.sample(range(len(names)), len(names) // 10)
    values = [names[i] for i in places]
    rng.shuffle(values)
    for place, value in zip(places, values, strict=True):
        names[place] = value


def _loraplex() -> Policy:
    router, turns = ReplicaRouter(), itertools.count()

    def policy(replicas: Sequence[ReplicaSnapshot], adapter: str, prompt_hash: int) -> str:
        choice = router.choose(replicas, (adapter,), prompt_hash, next(turns) / 100)
        if choice is None:
            raise LookupError("no replica is alive")
        return choice.replica_id

    return policy


def _round_robin() -> Policy:
    turns: Iterator[int] = itertools.count()
    return lambda replicas, adapter, prompt_hash: replicas[next(turns) % len(replicas)].replica_id


def _least_loaded() -> Policy:
    return lambda replicas, adapter, prompt_hash: (
        min(replicas, key=lambda r: (r.n_pending, r.replica_id)).replica_id
    )


def _hash_only() -> Policy:
    """Consistent hashing of the adapter, whatever the load."""

    def policy(replicas: Sequence[ReplicaSnapshot], adapter: str, prompt_hash: int) -> str:
        alike = [ReplicaSnapshot(r.replica_id, 0, 1, n_free_slots=1) for r in replicas]
        choice = choose(alike, (adapter,), prompt_hash)
        return replicas[0].replica_id if choice is None else choice.replica_id

    return policy


def _two_choices_multiplexed() -> Policy:
    """Two random holders, the shorter queue; without holders those with the fewest adapters."""
    rng = random.Random(0)

    def policy(replicas: Sequence[ReplicaSnapshot], adapter: str, prompt_hash: int) -> str:
        holders = [r for r in replicas if adapter in r.device and r.n_pending < r.capacity]
        fewest = min(len(r.device) for r in replicas)
        pool = holders or [r for r in replicas if len(r.device) == fewest]
        two = rng.sample(pool, min(2, len(pool)))
        return min(two, key=lambda r: (r.n_pending, r.replica_id)).replica_id

    return policy


# Factories: a policy may keep state, so every run builds its own.
POLICIES: dict[str, Callable[[], Policy]] = {
    "loraplex": _loraplex,
    "two choices + multiplexing": _two_choices_multiplexed,
    "consistent hash": _hash_only,
    "least loaded": _least_loaded,
    "round robin": _round_robin,
}
TRACES: dict[str, Callable[..., list[Arrival]]] = {
    "zipf": zipf,
    "drift": drift,
    "replica loss": replica_loss,
}
