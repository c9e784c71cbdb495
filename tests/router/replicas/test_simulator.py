from __future__ import annotations

import pytest

from loraplex_router.replicas.compare import compare, table
from loraplex_router.replicas.simulator import Arrival, Costs, FleetShape, simulate
from loraplex_router.replicas.traces import POLICIES, TRACES, zipf

SMALL = FleetShape(n_replicas=2, capacity=2, n_device=1, n_host=1, report_delay_s=0.0)


def test_waits_are_load_times_and_queueing_by_hand() -> None:
    trace = [
        Arrival(0.0, "a", 0, 1.0),  # from disk: 0.42
        Arrival(2.0, "a", 0, 1.0),  # on device: 0
        Arrival(10.0, "b", 0, 1.0),  # evicts a from device and host: 0.42
    ]
    one = FleetShape(n_replicas=1, capacity=1, n_device=1, n_host=1)
    result = simulate(trace, POLICIES["loraplex"](), shape=one, costs=Costs())
    assert result.mean_wait_ms == pytest.approx((420 + 0 + 420) / 3)
    assert result.device_hits == pytest.approx(1 / 3)
    assert result.cold_loads == pytest.approx(2 / 3)


def test_every_request_of_every_trace_ends_even_when_a_replica_is_lost() -> None:
    for name, make_trace in TRACES.items():
        trace = make_trace(n_requests=1500)
        for make_policy in POLICIES.values():
            result = simulate(trace, make_policy())
            # A request that ran on the lost replica is counted again where it ran to its end.
            assert 1500 <= result.n_requests <= 1500 + result.n_retried
            assert name == "replica loss" or result.n_retried == 0


def test_an_adapter_in_use_is_never_evicted() -> None:
    trace = [Arrival(0.0, "a", 0, 5.0), Arrival(1.0, "b", 0, 1.0)]
    one = FleetShape(n_replicas=1, capacity=2, n_device=1, n_host=4)
    result = simulate(trace, POLICIES["loraplex"](), shape=one)
    assert result.mean_wait_ms == pytest.approx((420 + (5.42 - 1.0) * 1000 + 420) / 2)


def test_the_policy_reads_less_from_disk_and_waits_less_than_load_alone() -> None:
    trace = zipf(n_requests=6000)
    ours = simulate(trace, POLICIES["loraplex"]())
    load_only = simulate(trace, POLICIES["least loaded"]())
    assert ours.cold_loads < 0.4 * load_only.cold_loads
    assert ours.mean_wait_ms < 0.5 * load_only.mean_wait_ms
    assert ours.imbalance < 1.35


def test_the_same_seed_gives_the_same_table() -> None:
    assert table(compare(n_requests=300)) == table(compare(n_requests=300))


def test_small_fleets_work() -> None:
    assert simulate(zipf(n_requests=200, n_adapters=5), POLICIES["loraplex"](), shape=SMALL)
