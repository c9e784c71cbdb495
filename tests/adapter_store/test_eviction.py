"""Policies as pure functions, and what they do on traffic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_adapter_store.tiers.eviction import (
    Resident,
    cost_aware,
    lfu_aged,
    spare_bytes,
    touch,
    victims,
)
from tests.support.adapters.eviction_traces import (
    POLICIES,
    drifting,
    lru,
    make_sizes,
    scanning,
    simulate,
    zipf,
)

A = Resident("a", n_bytes=10, load_cost=1.0, last_used=1)
B = Resident("b", n_bytes=10, load_cost=1.0, last_used=5)
C = Resident("c", n_bytes=40, load_cost=1.0, last_used=3)


def test_lru_takes_the_one_used_longest_ago() -> None:
    assert victims([B, C, A], 5, clock=9, policy=lru) == ("a",)
    assert victims([B, C, A], 11, clock=9, policy=lru) == ("a", "c")


def test_lfu_keeps_the_often_used_though_used_earlier() -> None:
    often = A
    for clock in (2, 3, 4):
        often = touch(often, clock)
    assert victims([often, B], 1, clock=6, policy=lfu_aged) == ("b",)


def test_old_uses_fade() -> None:
    once_hot = Resident("a", 10, 1.0, last_used=10, heat=8.0)
    assert victims([once_hot, B], 1, clock=20, policy=lfu_aged) == ("b",)
    late = Resident("b", 10, 1.0, last_used=5000, heat=1.0)
    assert victims([once_hot, late], 1, clock=5001, policy=lfu_aged) == ("a",)


def test_cost_per_byte_decides_between_equally_used_ones() -> None:
    cheap = Resident("cheap", 10, 0.1, last_used=5)
    dear = Resident("dear", 10, 2.0, last_used=5)
    assert victims([dear, cheap], 1, clock=6, policy=cost_aware) == ("cheap",)


residents = st.lists(
    st.builds(
        Resident,
        key=st.text("abcdefgh", min_size=1, max_size=3),
        n_bytes=st.integers(1, 100),
        load_cost=st.floats(0, 10),
        last_used=st.integers(0, 100),
        heat=st.floats(0, 100),
    ),
    unique_by=lambda resident: resident.key,
    max_size=8,
)


@given(residents, st.integers(1, 500), st.sampled_from(sorted(POLICIES)))
def test_victims_free_enough_or_nobody_leaves(
    found: list[Resident], n_bytes: int, policy: str
) -> None:
    chosen = victims(found, n_bytes, 100, POLICIES[policy])
    sizes = {resident.key: resident.n_bytes for resident in found}
    if chosen is None:
        assert sum(sizes.values()) < n_bytes
        return
    freed = [sizes[key] for key in chosen]
    assert sum(freed) >= n_bytes
    assert sum(freed[:-1]) < n_bytes, "the last victim was needed"
    assert len(set(chosen)) == len(chosen)


def test_others_lose_only_what_they_have_beyond_an_equal_share() -> None:
    spare = spare_bytes({"acme": 20, "umbra": 70}, 90, tenant="initech")  # a share is 30
    assert spare == {"acme": 0.0, "umbra": 40.0}
    acme = [Resident(f"a{i}", 10, 1.0, last_used=i, tenant="acme") for i in range(2)]
    umbra = [Resident(f"u{i}", 10, 1.0, last_used=5 + i, tenant="umbra") for i in range(7)]
    of_umbra = ("u0", "u1", "u2", "u3")
    assert victims([*acme, *umbra], 40, clock=20, policy=lru, spare=spare) == of_umbra
    assert victims([*acme, *umbra], 50, clock=20, policy=lru, spare=spare) is None
    own = spare_bytes({"acme": 20, "umbra": 70}, 90, tenant="acme")  # a share is 45
    assert victims([*acme, *umbra], 20, clock=20, policy=lru, spare=own) == ("a0", "a1")


@pytest.mark.parametrize("exponent", [0.7, 1.0])
def test_aged_counts_beat_recency_on_stable_traffic(exponent: float) -> None:
    sizes = make_sizes(200)
    capacity = sum(sizes.n_bytes) // 20
    trace = zipf(200, 6000, exponent)
    by = {name: simulate(trace, sizes, capacity, policy) for name, policy in POLICIES.items()}
    assert by["cost-aware"].hit_rate > by["lru"].hit_rate + 0.03
    assert by["cost-aware"].load_seconds < by["lru"].load_seconds


def test_no_policy_collapses_when_favourites_drift_or_somebody_scans() -> None:
    sizes = make_sizes(200)
    capacity = sum(sizes.n_bytes) // 4
    for trace in (drifting(200, 6000, 1.0, period=50), scanning(200, 6000, 1.0, every=1000)):
        by = {name: simulate(trace, sizes, capacity, policy) for name, policy in POLICIES.items()}
        assert by["cost-aware"].hit_rate > by["lru"].hit_rate - 0.05
