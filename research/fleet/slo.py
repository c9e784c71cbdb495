"""How many replicas a policy needs to keep a promise."""

from collections.abc import Callable
from dataclasses import replace

from .costs import Costs
from .fleet import FleetShape, Policy, simulate
from .traffic import Request, Workload


def replicas_needed(
    make_traffic: Callable[[Workload], list[Request]],
    work: Workload,
    shape: FleetShape,  # its n_replicas is not read
    costs: Costs,
    make_policy: Callable[[], Policy],
    *,
    ttft_p99_ms: float,
    at_most: int,
) -> int | None:
    """The least n whose p99 of the time to the first token holds; None if ``at_most`` does not.

    By bisection, as if more replicas were never slower; for hashing that is nearly so.
    """
    requests = make_traffic(work)

    def holds(n: int) -> bool:
        fleet = replace(shape, n_replicas=n)
        return simulate(requests, work, fleet, costs, make_policy()).ttft_p99_ms <= ttft_p99_ms

    if not holds(at_most):
        return None
    low, high = 0, at_most  # low does not hold, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
