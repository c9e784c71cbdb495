"""Which plans leave a full tier: pure functions of what is known about each resident."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

__all__ = [
    "POLICIES",
    "Resident",
    "cost_aware",
    "lfu_aged",
    "lru",
    "spare_bytes",
    "touch",
    "victims",
]

HALF_LIFE = 256.0  # acquisitions of the whole tier after which an old one counts half


@dataclass(frozen=True, slots=True)
class Resident:
    """``last_used`` counts acquisitions of the whole tier; ``heat`` is the aged use count then."""

    key: str
    n_bytes: int
    load_cost: float  # seconds it takes to bring it back
    last_used: int
    heat: float = 1.0
    tenant: str = ""


Policy = Callable[[Resident, int], float]


def touch(resident: Resident, clock: int) -> Resident:
    """The resident after one more use at ``clock``."""
    heat = resident.heat * _decay(clock - resident.last_used) + 1.0
    return Resident(
        resident.key, resident.n_bytes, resident.load_cost, clock, heat, resident.tenant
    )


def lru(resident: Resident, clock: int) -> float:
    """Value of keeping: how recently it was used."""
    return float(resident.last_used - clock)


def lfu_aged(resident: Resident, clock: int) -> float:
    """Value of keeping: uses, each halved every ``HALF_LIFE`` acquisitions."""
    return resident.heat * _decay(clock - resident.last_used)


def cost_aware(resident: Resident, clock: int) -> float:
    """Value of keeping per byte: expected use × cost of bringing it back / bytes."""
    return lfu_aged(resident, clock) * resident.load_cost / max(1, resident.n_bytes)


POLICIES: Mapping[str, Policy] = {"lru": lru, "lfu-aged": lfu_aged, "cost-aware": cost_aware}


def spare_bytes(used: Mapping[str, int], n_bytes: int, tenant: str) -> dict[str, float]:
    """How much each tenant may lose for ``tenant``: what it has beyond an equal share.

    ``used``: bytes of each tenant; ``n_bytes``: of the whole tier. ``tenant`` may lose all it has.
    """
    share = n_bytes / len({*used, tenant})
    return {of: math.inf if of == tenant else max(0.0, n - share) for of, n in used.items()}


def victims(
    residents: Iterable[Resident],
    n_bytes: int,
    clock: int,
    policy: Policy,
    spare: Mapping[str, float] | None = None,
) -> tuple[str, ...] | None:
    """Least valuable first, until ``n_bytes`` are free; None if all of them are not enough.

    ``spare``: see ``spare_bytes``; without it everybody may lose everything.
    """
    chosen: list[str] = []
    freed = 0
    left = None if spare is None else dict(spare)
    for resident in sorted(residents, key=lambda item: (policy(item, clock), item.key)):
        if freed >= n_bytes:
            break
        if left is not None:
            if left[resident.tenant] <= 0:
                continue
            left[resident.tenant] -= resident.n_bytes
        chosen.append(resident.key)
        freed += resident.n_bytes
    return tuple(chosen) if freed >= n_bytes else None


def _decay(age: int) -> float:
    return math.exp2(-age / HALF_LIFE)
