"""How many engine replicas are wanted: by the requests there are, and by the adapters they use.

Ray asks once in a while, and applies bounds and delays to the answer itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ADAPTERS_IN_USE", "DEVICE_SLOTS", "policy", "wanted_replicas"]

# What replicas report (``EngineReplica.record_autoscaling_stats``).
ADAPTERS_IN_USE = "adapters_in_use"  # distinct, of running and waiting requests
DEVICE_SLOTS = "device_slots"  # places for adapters on the device


def wanted_replicas(
    n_requests: float,
    requests_per_replica: float,
    adapters_in_use: Sequence[float],
    device_slots: Sequence[float],
) -> int:
    """Enough for the requests, and enough for every adapter in use to stay on a device.

    A replica whose requests use more adapters than it has places loads and evicts in turn: another
    one takes a part of them, since the router keeps an adapter where it is.
    """
    by_load = math.ceil(n_requests / requests_per_replica)
    slots = max(device_slots, default=0.0)
    by_tier = math.ceil(sum(adapters_in_use) / slots) if slots else 0
    return max(by_load, by_tier)


def policy(context: Any) -> tuple[int, dict[str, Any]]:  # ray.serve.config.AutoscalingContext
    """For ``AutoscalingPolicy``. Without a replica the requests that wait decide."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    wanted = wanted_replicas(
        context.total_num_requests,
        context.config.get_target_ongoing_requests(),
        list(metrics.get(ADAPTERS_IN_USE, {}).values()),
        list(metrics.get(DEVICE_SLOTS, {}).values()),
    )
    return wanted, {}
