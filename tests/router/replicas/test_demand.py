"""How many homes an adapter has: in proportion to demand, and slow to change."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_router.replicas.policy import HYSTERESIS, DemandMeter, ReplicaRouter, n_homes
from loraplex_router.replicas.snapshot import ReplicaSnapshot

HOT = ("h" * 64,)


def fleet(n: int, n_pending: int, n_holders: int = 0) -> list[ReplicaSnapshot]:
    return [
        ReplicaSnapshot(
            f"r{i:03d}",
            n_pending,
            8,
            device=frozenset(HOT if i < n_holders else ()),
            n_evictable=1,
        )
        for i in range(n)
    ]


def test_a_share_fades_by_half_in_a_half_life_while_others_are_asked_for() -> None:
    meter = DemandMeter(half_life_s=10.0)
    for _ in range(8):
        meter.record("a", 0.0)
    assert meter.share("a", 0.0) == pytest.approx((8 - 8**0.5) / 8)
    for _ in range(4):
        meter.record("b", 10.0)  # a's 8 are worth 4 now
    assert meter.share("a", 10.0) == pytest.approx((4 - 2) / 8)
    assert meter.share("b", 10.0) == pytest.approx(meter.share("a", 10.0))
    assert meter.share("never", 10.0) == 0.0


def test_a_one_off_has_no_share() -> None:
    meter = DemandMeter()
    meter.record("a", 0.0)
    assert meter.share("a", 0.0) == 0.0


def test_adapters_that_nobody_asks_for_are_forgotten() -> None:
    meter = DemandMeter(half_life_s=1.0)
    for second in range(20_000):
        meter.record(f"one-off-{second}", float(second))
    assert len(meter._requests) < 2_000


def test_a_hot_adapter_has_homes_in_proportion_and_a_cold_one_has_one() -> None:
    busy = fleet(20, n_pending=6)
    assert n_homes(0.001, busy, HOT) == 1
    assert n_homes(0.3, busy, HOT) == math.ceil(0.3 * 20 * (6 / 8) / 0.7)
    assert n_homes(1.0, busy, HOT) == 20
    assert n_homes(0.5, fleet(20, n_pending=0), HOT) == 1  # an idle fleet copies nothing
    assert n_homes(1.0, [], HOT) == 1


def test_long_queues_do_not_put_an_adapter_everywhere() -> None:
    assert n_homes(0.1, fleet(100, n_pending=800), HOT) == 15


@settings(deadline=None)
@given(
    share=st.floats(0, 1), n=st.integers(1, 50), pending=st.integers(0, 40), held=st.integers(0, 50)
)
def test_copies_that_exist_stay_until_demand_has_fallen_by_a_third(
    share: float, n: int, pending: int, held: int
) -> None:
    held = min(held, n)
    needed = n_homes(share, fleet(n, pending, 0), HOT)
    homes = n_homes(share, fleet(n, pending, held), HOT)
    assert needed <= homes <= n
    assert homes <= max(needed, held)
    assert homes <= math.ceil(HYSTERESIS * needed)


@settings(deadline=None)
@given(drift=st.lists(st.floats(0.27, 0.33), min_size=5, max_size=30))
def test_demand_that_wavers_by_a_tenth_copies_an_adapter_at_most_once(drift: list[float]) -> None:
    held = n_homes(0.3, fleet(40, 6), HOT)
    changes = 0
    for share in drift:
        homes = n_homes(share, fleet(40, 6, held), HOT)
        changes += homes != held
        held = homes
    # It may grow to the largest need, and never shrinks on the way.
    assert held <= math.ceil(0.33 * 40 * 6 / 8 / 0.7)
    assert changes <= 3


def test_a_hot_adapter_spreads_while_cold_ones_stay_where_they_are() -> None:
    rng = random.Random(0)
    router = ReplicaRouter()
    cold = [f"{i:064x}" for i in range(20)]
    went: dict[str, set[str]] = {}
    replicas = fleet(10, n_pending=5)
    for request in range(2000):
        name = HOT[0] if rng.random() < 0.5 else rng.choice(cold)
        choice = router.rank(replicas, (name,), rng.getrandbits(60) or 1, request / 100)[0]
        went.setdefault(name, set()).add(choice.replica_id)
        replicas = [
            ReplicaSnapshot(
                r.replica_id, 5, 8, r.device | {name} if r is choice else r.device, n_evictable=1
            )
            for r in replicas
        ]
    assert 5 <= len(went[HOT[0]]) <= 8
    assert all(len(went[name]) == 1 for name in cold)


def test_several_gateways_choose_alike() -> None:
    first, second = ReplicaRouter(), ReplicaRouter()
    replicas = fleet(10, n_pending=5)
    for request in range(400):
        digests = HOT if request % 2 else (f"{request % 40:064x}",)
        router = first if request % 4 < 2 else second
        router.rank(replicas, digests, request + 1, request / 100)
    for prompt in range(1, 50):
        one = first.rank(replicas, HOT, prompt, 4.0)[0]
        other = second.rank(replicas, HOT, prompt, 4.0)[0]
        assert one is other
