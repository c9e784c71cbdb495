from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from loraplex_router.replicas import AdapterLocation, ReplicaSnapshot, choose, rank

DIGEST = "d" * 64


def replica(name: str, n_pending: int = 0, **where: object) -> ReplicaSnapshot:
    device = frozenset([DIGEST]) if where.get("device") else frozenset()
    host = frozenset([DIGEST]) if where.get("host") else frozenset()
    return ReplicaSnapshot(
        name,
        n_pending,
        capacity=8,
        device=device,
        host=host,
        n_free_slots=1 if where.get("free") else 0,
        n_evictable=1 if where.get("evictable") else 0,
    )


LADDER = [
    replica("on-device", device=True),
    replica("on-host", host=True),
    replica("free-slot", free=True),
    replica("evictable", evictable=True),
    replica("full"),
]


def test_the_nearest_location_wins_at_equal_load() -> None:
    for first in range(len(LADDER)):
        choice = choose(LADDER[first:], DIGEST, 7)
        assert choice is not None
        assert (choice.replica_id, choice.location) == (
            LADDER[first].replica_id,
            AdapterLocation(first),
        )
        assert not choice.spilled


def test_the_order_in_which_replicas_are_listed_does_not_matter() -> None:
    chosen = {choose(p, DIGEST, 7) for p in itertools.permutations(LADDER)}
    assert len(chosen) == 1


def test_an_overloaded_holder_spills_to_the_next_best() -> None:
    crowded = replica("on-device", n_pending=40, device=True)
    choice = choose([crowded, *LADDER[1:]], DIGEST, 7)
    assert choice is not None
    assert choice.replica_id == "on-host"
    assert choice.spilled


def test_a_holder_a_little_busier_than_the_rest_keeps_its_adapter() -> None:
    busy = replica("on-device", n_pending=1, device=True)
    choice = choose([busy, *LADDER[1:]], DIGEST, 7)
    assert choice is not None
    assert choice.replica_id == "on-device"


def test_when_everyone_is_overloaded_but_one_the_rest_follows_by_load() -> None:
    ranked = rank([replica("a", 50), replica("b", 90), replica("c", 0)], DIGEST, 1)
    assert [r.replica_id for r in ranked] == ["c", "a", "b"]


def test_equal_prompts_meet_on_the_same_holder_and_different_ones_spread() -> None:
    holders = [replica(f"r{i}", device=True) for i in range(6)]
    homes = [choose(holders, DIGEST, prompt) for prompt in range(60)]
    assert homes == [choose(holders, DIGEST, prompt) for prompt in range(60)]
    assert len({home.replica_id for home in homes if home is not None}) == 6


def test_a_cold_adapter_has_one_home_whatever_the_prompt() -> None:
    empty = [replica(f"r{i}", free=True) for i in range(6)]
    assert len({choose(empty, DIGEST, prompt) for prompt in range(40)}) == 1


def test_losing_one_replica_moves_only_its_own_adapters() -> None:
    fleet = [replica(f"r{i}", free=True) for i in range(8)]
    digests = [f"{i:064x}" for i in range(200)]
    before = {d: choose(fleet, d, 0) for d in digests}
    after = {d: choose(fleet[:-1], d, 0) for d in digests}
    moved = [d for d in digests if before[d] != after[d]]
    assert moved
    assert all(before[d].replica_id == "r7" for d in moved)  # type: ignore[union-attr]


def test_the_base_model_is_resident_everywhere() -> None:
    choice = choose([replica("only")], None, 3)
    assert choice is not None
    assert choice.location is AdapterLocation.DEVICE


def test_no_replica_no_choice() -> None:
    assert choose([], DIGEST, 0) is None


@given(
    loads=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    device=st.sets(st.integers(0, 11)),
    prompt=st.integers(0, 2**63),
)
def test_the_choice_is_never_overloaded_while_another_replica_is_not(
    loads: list[int], device: set[int], prompt: int
) -> None:
    fleet = [replica(f"r{i:02d}", load, device=i in device) for i, load in enumerate(loads)]
    choice = choose(fleet, DIGEST, prompt)
    assert choice is not None
    chosen = next(r for r in fleet if r.replica_id == choice.replica_id)
    mean = (sum(loads) + 1) / (8 * len(loads))
    assert chosen.load <= max(1.25 * mean, mean + 1 / 8) or chosen.load == min(
        r.load for r in fleet
    )
    assert sorted(r.replica_id for r in rank(fleet, DIGEST, prompt)) == sorted(
        r.replica_id for r in fleet
    )
