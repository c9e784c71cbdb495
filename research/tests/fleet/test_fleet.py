"""The simulated fleet against arithmetic by hand, queueing theory and the theory of LRU caches."""

import numpy as np
import pytest

from research.fleet import TRAFFIC, Costs, FleetShape, LoadCost, Request, Workload
from research.fleet.fleet import simulate
from research.fleet.policies import POLICIES

COSTS = Costs(
    step_ms=2.0,
    row_ms=0.5,
    prefill_token_ms=0.1,
    rank_row_ms=0.01,
    overhead_ms=3.0,
    host_to_device=LoadCost(5.0, 0.0),
    disk_to_host=LoadCost(10.0, 4.0),
)
FREE_LOADS = Costs(2.0, 0.5, 0.1, 0.0, 0.0, LoadCost(0.0, 0.0), LoadCost(0.0, 0.0))
ONE = FleetShape(n_replicas=1, prefix_tokens=0)


def served_ms(requests: list[Request], shape: FleetShape = ONE, costs: Costs = COSTS) -> float:
    """Mean time to the first token after the warm-up."""
    work = Workload(n_adapters=50, rate_per_s=1.0, n_requests=len(requests))
    return simulate(requests, work, shape, costs, POLICIES["loraplex"]()).ttft_mean_ms


def test_one_request_is_load_prefill_and_overhead() -> None:
    n_bytes = Workload(50, 1.0, 1).n_bytes(0)
    load = 10.0 + 4.0 * n_bytes / 1e6 + 5.0
    assert served_ms([Request(1.0, 0, 0, 100, 4)]) == pytest.approx(load + 2.0 + 10.0 + 3.0)


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    warm = Request(0.0, 0, 0, 1, 1)
    later = Request(9.0, 0, 0, 300, 1)  # 128 + 128 + 44
    assert served_ms([warm, later, later._replace(time_s=19.0)]) == pytest.approx(
        (300 * 0.1 + 3 * 2.0 + 3.0) * 2 / 3 + served_ms([warm]) / 3
    )


def test_who_comes_during_a_step_joins_at_its_end() -> None:
    base = [Request(float(i), 0, 0, 1, 1) for i in range(6)]  # on the device after the first
    long = Request(10.0, 0, 0, 1, 1000)  # decode steps of 2.5 ms + 8 ranks
    step = 2.0 + 0.5 + 8 * 0.01
    first = 10.0 + (2.0 + 0.1) / 1000  # end of its prefill
    comes = first + 10.3 * step / 1000
    waits = 0.7 * step
    joins = 2.0 + 0.5 + 0.08 + 0.1 + 3.0  # a step with one decode row and one prefill token
    mean = served_ms([*base, long, Request(comes, 0, 0, 1, 1)])  # of the last six
    assert mean == pytest.approx((5 * (2.0 + 0.1 + 3.0) + waits + joins) / 6)


def test_waiting_is_that_of_a_queue_with_poisson_arrivals_and_one_server() -> None:
    """Pollaczek and Khinchine: the mean wait is ρ S / (2 (1 − ρ)) for a constant service S."""
    shape = FleetShape(n_replicas=1, capacity=1, n_device=1, prefix_tokens=0)
    service_ms = 2.0 + 100 * 0.1
    rng = np.random.default_rng(0)
    for load in (0.5, 0.8):
        times = np.cumsum(rng.exponential(service_ms / load / 1000, 40_000))
        requests = [Request(float(t), 0, 0, 100, 1) for t in times]
        expected = service_ms * (1 + load / (2 * (1 - load)))
        assert served_ms(requests, shape, FREE_LOADS) == pytest.approx(expected, rel=0.06)


def test_hits_are_those_of_an_lru_cache() -> None:
    """Che, Tung and Wang 2002: with T such that Σ (1 − e^(−pT)) = C, the hit rate of an adapter of
    popularity p is 1 − e^(−pT)."""
    work = Workload(n_adapters=60, rate_per_s=1.0, n_requests=20_000, mean_output=2)
    popularity = np.arange(1, 61.0) ** -1
    popularity /= popularity.sum()
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        held = (1 - np.exp(-popularity * middle)).sum()
        low, high = (middle, high) if held < 10 else (low, middle)
    expected = float((popularity * (1 - np.exp(-popularity * low))).sum())
    shape = FleetShape(n_replicas=1, n_device=10, prefix_tokens=0)
    result = simulate(TRAFFIC["zipf"](work), work, shape, FREE_LOADS, POLICIES["round robin"]())
    assert result.device_hits == pytest.approx(expected, abs=0.02)
    assert result.device_loads_per_request == pytest.approx(1 - expected, abs=0.02)


@pytest.mark.parametrize("kind", TRAFFIC)
def test_every_request_is_served_under_every_policy(kind: str) -> None:
    work = Workload(n_adapters=40, rate_per_s=60.0, n_requests=800)
    requests = TRAFFIC[kind](work)
    for make in POLICIES.values():
        result = simulate(requests, work, FleetShape(n_replicas=3), COSTS, make())
        assert result.n_requests == 600
        assert result.device_hits + result.host_hits + result.disk_loads == pytest.approx(1.0)
        assert result == simulate(requests, work, FleetShape(n_replicas=3), COSTS, make())


def test_placement_reads_less_than_balancing_and_waits_less_than_hashing() -> None:
    shape = FleetShape(n_replicas=8)
    rate = 0.6 * 8 * COSTS.requests_per_s(160, 32, shape.capacity)
    work = Workload(n_adapters=100, rate_per_s=rate, n_requests=4000)
    requests = TRAFFIC["zipf"](work)
    results = {
        name: simulate(requests, work, shape, COSTS, make()) for name, make in POLICIES.items()
    }
    ours = results["loraplex"]
    assert ours.mb_read_per_request < 0.8 * results["power of two"].mb_read_per_request
    assert ours.disk_loads < 0.4 * results["round robin"].disk_loads
    assert ours.ttft_p99_ms < 0.2 * results["consistent hash"].ttft_p99_ms
