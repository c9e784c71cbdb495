from dataclasses import replace

from research.fleet import TRAFFIC, Costs, FleetShape, LoadCost, Workload, simulate
from research.fleet.policies import POLICIES
from research.fleet.slo import replicas_needed

COSTS = Costs(2.0, 0.5, 0.1, 0.0, 0.0, LoadCost(2.0, 0.0), LoadCost(5.0, 0.0))


def test_it_is_the_least_fleet_that_keeps_the_promise() -> None:
    work = Workload(n_adapters=30, rate_per_s=90.0, n_requests=1500)
    shape, make = FleetShape(), POLICIES["loraplex"]
    n = replicas_needed(TRAFFIC["zipf"], work, shape, COSTS, make, ttft_p99_ms=80, at_most=16)
    assert n is not None
    p99 = [
        simulate(
            TRAFFIC["zipf"](work), work, replace(shape, n_replicas=k), COSTS, make()
        ).ttft_p99_ms
        for k in (n - 1, n)
    ]
    assert p99[0] > 80 >= p99[1]


def test_a_promise_below_the_prefill_itself_is_never_kept() -> None:
    work = Workload(n_adapters=30, rate_per_s=90.0, n_requests=200)
    make = POLICIES["round robin"]
    assert (
        replicas_needed(
            TRAFFIC["zipf"], work, FleetShape(), COSTS, make, ttft_p99_ms=1.0, at_most=4
        )
        is None
    )
