"""The number of engine replicas, from the number of requests and of the adapters in use.

Ray calls ``policy`` from time to time and applies its own bounds and delays to the result.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Metrics that replicas report (``EngineReplica.record_autoscaling_stats``).
ADAPTERS_IN_USE = "adapters_in_use"  # distinct, of running and waiting requests
DEVICE_SLOTS = "device_slots"  # adapters that fit the device


def wanted_replicas(
    n_requests: float,
    requests_per_replica: float,
    adapters_in_use: Sequence[float],
    device_slots: Sequence[float],
) -> int:
    """Return enough replicas for the requests, and to keep all adapters in use on a device.

    A replica with more adapters in use than slots loads and evicts in turn. The router keeps an
    adapter where it is, so another replica takes over a part of them.
    """
    for_requests = math.ceil(n_requests / requests_per_replica)
    slots = max(device_slots, default=0.0)
    for_adapters = math.ceil(sum(adapters_in_use) / slots) if slots else 0
    return max(for_requests, for_adapters)


def policy(context: Any) -> tuple[int, dict[str, Any]]:  # ray.serve.config.AutoscalingContext
    """Ray's ``AutoscalingPolicy``. Without a replica the waiting requests decide."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    wanted = wanted_replicas(
        context.total_num_requests,
        context.config.get_target_ongoing_requests(),
        list(metrics.get(ADAPTERS_IN_USE, {}).values()),
        list(metrics.get(DEVICE_SLOTS, {}).values()),
    )
    return wanted, {}
