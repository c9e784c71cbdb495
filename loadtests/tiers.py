"""Measures time to first token by the tier of the requested adapter, one request at a time."""

from collections.abc import Callable, Sequence

import httpx

from .client import StreamingClient
from .recorder import percentile
from .traffic import LoadRequest

TIERS = ("device", "host", "disk")


def probe_tiers(
    client: StreamingClient,
    admin: httpx.Client,
    names: Sequence[str],
    request_for: Callable[[str], LoadRequest],
    *,
    n: int,
) -> dict[str, dict[str, float | int | None]]:
    """Return TTFT of ``n`` requests for adapters of each tier that their cards name.

    Tiers without an adapter have no entry. Each adapter off the device is asked for once, so a
    probe never warms the next one.
    """
    found: dict[str, list[float]] = {tier: [] for tier in TIERS}
    used: set[str] = set()
    for tier in TIERS:
        for _ in range(n):
            name = _first_in(admin, tier, names, used if tier != "device" else set())
            if name is None:
                break
            used.add(name)
            outcome = client.stream(request_for(name).body)
            if outcome.ttft_s is not None and outcome.error is None:
                found[tier].append(outcome.ttft_s)
    return {
        tier: {"n": len(values), "ttft_p50_s": percentile(values, 50), "ttft_max_s": max(values)}
        for tier, values in found.items()
        if values
    }


def _first_in(admin: httpx.Client, tier: str, names: Sequence[str], used: set[str]) -> str | None:
    response = admin.get("/v1/adapters")
    if response.status_code != 200:
        return None
    tier_of = {card["name"]: card["tier"] for card in response.json()["data"]}
    return next((n for n in names if n not in used and tier_of.get(n) == tier), None)
