"""Chooses the plans that leave a full tier. Pure functions of what is known about each resident."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

HALF_LIFE = 256.0  # acquisitions of the whole tier after which an old one counts half


@dataclass(frozen=True, slots=True)
class Resident:
    """A plan in the tier. ``last_used`` counts all acquisitions; ``heat`` is the aged use count."""

    key: str
    n_bytes: int
    load_cost: float  # seconds to load it again
    last_used: int
    heat: float = 1.0
    tenant: str = ""


Policy = Callable[[Resident, int], float]  # (resident, clock) → value of keeping it


def touch(resident: Resident, clock: int) -> Resident:
    """Return the resident after one more use at ``clock``."""
    heat = resident.heat * _decay(clock - resident.last_used) + 1.0
    return replace(resident, last_used=clock, heat=heat)


def lfu_aged(resident: Resident, clock: int) -> float:
    """The number of uses, each halved every ``HALF_LIFE`` acquisitions."""
    return resident.heat * _decay(clock - resident.last_used)


def cost_aware(resident: Resident, clock: int) -> float:
    """Expected uses × seconds to load it again ÷ bytes."""
    return lfu_aged(resident, clock) * resident.load_cost / max(1, resident.n_bytes)


def spare_bytes(used: Mapping[str, int], n_bytes: int, tenant: str) -> dict[str, float]:
    """Return how many bytes each tenant may lose to ``tenant``: its excess over an equal share.

    ``used``: bytes of each tenant; ``n_bytes``: bytes of the whole tier. ``tenant`` may lose all.
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
    """Return the least valuable residents that free ``n_bytes``; None if all are not enough.

    ``spare``: see ``spare_bytes``; without it every tenant may lose everything.
    """
    chosen: list[str] = []
    freed = 0
    budget = None if spare is None else dict(spare)
    for resident in sorted(residents, key=lambda item: (policy(item, clock), item.key)):
        if freed >= n_bytes:
            break
        if budget is not None:
            if budget[resident.tenant] <= 0:
                continue
            budget[resident.tenant] -= resident.n_bytes
        chosen.append(resident.key)
        freed += resident.n_bytes
    return tuple(chosen) if freed >= n_bytes else None


def _decay(age: int) -> float:
    return math.exp2(-age / HALF_LIFE)
