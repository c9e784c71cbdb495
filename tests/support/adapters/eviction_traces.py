"""Compare eviction policies on synthetic traffic.

Run it by `python -m tests.support.adapters.eviction_traces`.

Traces of adapter uses (Zipf, Zipf whose favourites drift, Zipf with scans through everything) run
against a tier of a given size; what counts is the time requests wait for loads.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loraplex_adapter_store.tiers.eviction import (
    Policy,
    Resident,
    cost_aware,
    lfu_aged,
    touch,
    victims,
)

_SECONDS_PER_BYTE = 1 / 400e6
_SECONDS_PER_LOAD = 0.004


def lru(resident: Resident, clock: int) -> float:
    """LRU, the policy that the store's own is compared with."""
    return float(resident.last_used - clock)


POLICIES: Mapping[str, Policy] = {"lru": lru, "lfu-aged": lfu_aged, "cost-aware": cost_aware}


@dataclass(frozen=True, slots=True)
class AdapterSizes:
    """The size in bytes and load time in seconds of each adapter."""

    n_bytes: tuple[int, ...]
    load_cost: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    hit_rate: float
    load_seconds: float  # per 1000 uses
    loaded_bytes: int


def make_sizes(n_adapters: int, seed: int = 0) -> AdapterSizes:
    """Return adapters of ranks 4 to 64 in random order (1.2 MB per 4 ranks)."""
    generator = random.Random(seed)
    sizes = tuple(
        generator.choice((4, 8, 8, 16, 16, 32, 64)) * 305_280 * 4 for _ in range(n_adapters)
    )
    costs = tuple(_SECONDS_PER_LOAD + size * _SECONDS_PER_BYTE for size in sizes)
    return AdapterSizes(sizes, costs)


def zipf(n_adapters: int, n_uses: int, exponent: float, seed: int = 1) -> list[int]:
    generator = random.Random(seed)
    weights = list(accumulate(1 / (rank + 1) ** exponent for rank in range(n_adapters)))
    return generator.choices(range(n_adapters), cum_weights=weights, k=n_uses)


def drifting(
    n_adapters: int, n_uses: int, exponent: float, period: int, seed: int = 1
) -> list[int]:
    """Return Zipf traffic whose favourites shift by one adapter every ``period`` uses."""
    trace = zipf(n_adapters, n_uses, exponent, seed)
    return [(rank + use // period) % n_adapters for use, rank in enumerate(trace)]


def scanning(n_adapters: int, n_uses: int, exponent: float, every: int, seed: int = 1) -> list[int]:
    """Return Zipf traffic with a scan of all adapters every ``every`` uses."""

    def uses() -> Iterator[int]:
        for number, rank in enumerate(zipf(n_adapters, n_uses, exponent, seed)):
            if number % every == every - 1:
                yield from range(n_adapters)
            yield rank

    return list(uses())


def simulate(trace: Sequence[int], sizes: AdapterSizes, capacity: int, policy: Policy) -> Outcome:
    """Replay ``trace`` with the functions that the host tier uses."""
    residents: dict[str, Resident] = {}
    parked: dict[str, float] = {}
    used = hits = loaded = 0
    waited = 0.0
    for clock, adapter in enumerate(trace, start=1):
        key = str(adapter)
        if key in residents:
            residents[key] = touch(residents[key], clock)
            hits += 1
            continue
        size, cost = sizes.n_bytes[adapter], sizes.load_cost[adapter]
        missing = used + size - capacity
        if missing > 0:
            for victim in victims(residents.values(), missing, clock, policy) or ():
                gone = residents.pop(victim)
                parked[victim] = gone.heat
                used -= gone.n_bytes
        heat = parked.pop(key, 0.0) + 1.0
        residents[key] = Resident(key, size, cost, clock, heat)
        used += size
        loaded += size
        waited += cost
    n_uses = len(trace)
    return Outcome(hits / n_uses, 1000 * waited / n_uses, loaded)


def _traces(n_adapters: int, n_uses: int) -> Mapping[str, Sequence[int]]:
    return {
        "Zipf 1.0": zipf(n_adapters, n_uses, 1.0),
        "Zipf 0.7": zipf(n_adapters, n_uses, 0.7),
        "Zipf 1.0, drifting": drifting(n_adapters, n_uses, 1.0, period=50),
        "Zipf 1.0, with scans": scanning(n_adapters, n_uses, 1.0, every=2000),
    }


def main() -> None:
    n_adapters, n_uses = 500, 20_000
    sizes = make_sizes(n_adapters)
    total = sum(sizes.n_bytes)
    print("| trace | tier | " + " | ".join(POLICIES) + " |")
    print("| --- | --- |" + " --- |" * len(POLICIES))
    for name, trace in _traces(n_adapters, n_uses).items():
        for share in (0.05, 0.1, 0.25):
            cells = []
            for policy in POLICIES.values():
                outcome = simulate(trace, sizes, int(total * share), policy)
                cells.append(f"{outcome.hit_rate:.1%}, {outcome.load_seconds:.1f} s")
            print(f"| {name} | {share:.0%} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
