"""First tokens by the tier that an adapter lay in when it was asked for, one request at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from .recorder import percentile
from .streaming import Connections
from .traffic import Ask

__all__ = ["TIERS", "probe_tiers"]

TIERS = ("device", "host", "disk")


def probe_tiers(
    connections: Connections,
    names: Sequence[str],
    ask: Callable[[str], Ask],
    *,
    n: int,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float | int | None]]:
    """TTFT of ``n`` requests for adapters of each tier, as their cards say just before.

    Tiers that no adapter lies in have no entry. The next adapter is taken from those that were
    not asked for yet, so a probe never warms the next one.
    """
    found: dict[str, list[float]] = {tier: [] for tier in TIERS}
    used: set[str] = set()
    for tier in TIERS:
        for _ in range(n):
            name = _first_in(connections, tier, names, used if tier != "device" else set())
            if name is None:
                break
            used.add(name)
            outcome = connections.stream(ask(name).body)
            if outcome.ttft_s is not None and outcome.error is None:
                found[tier].append(outcome.ttft_s)
            on_done()
    return {
        tier: {
            "n": len(values),
            "ttft_p50_s": percentile(values, 50),
            "ttft_max_s": max(values),
        }
        for tier, values in found.items()
        if values
    }


def _first_in(
    connections: Connections, tier: str, names: Sequence[str], used: set[str]
) -> str | None:
    status, text = connections.send("GET", "/v1/adapters")
    if status != 200:
        return None
    lying = {card["name"]: card["tier"] for card in json.loads(text)["data"]}
    return next((n for n in names if n not in used and lying.get(n) == tier), None)
