"""The choice of a replica, by hand and by property."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_router.replicas.policy import LoadBounds, load_bounds, rank
from loraplex_router.replicas.snapshot import AdapterLocation, ReplicaSnapshot

DIGEST = "d" * 64
OTHER = "e" * 64
WANTED = (DIGEST,)


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


def bounds_of(fleet: Sequence[ReplicaSnapshot]) -> LoadBounds:
    return load_bounds([r.load for r in fleet], [max(1, r.capacity) for r in fleet])


def chosen(
    fleet: list[ReplicaSnapshot],
    digests: tuple[str, ...] = WANTED,
    prompt: int = 7,
    n_homes: int = 1,
) -> ReplicaSnapshot:
    return rank(fleet, digests, prompt, n_homes=n_homes)[0]


def test_the_nearest_location_wins_at_equal_load() -> None:
    for first in range(len(LADDER)):
        choice = chosen(LADDER[first:])
        assert choice is LADDER[first]
        assert choice.location(WANTED) is AdapterLocation(first)


def test_the_order_in_which_replicas_are_listed_does_not_matter() -> None:
    assert len({chosen(list(order)).replica_id for order in itertools.permutations(LADDER)}) == 1


def test_an_overloaded_holder_spills_to_one_that_evicts_nothing() -> None:
    crowded = replica("on-device", n_pending=40, device=True)
    assert chosen([crowded, *LADDER[2:]]).replica_id == "free-slot"


def test_a_holder_a_little_busier_than_the_rest_keeps_its_adapter() -> None:
    busy = replica("on-device", n_pending=1, device=True)
    assert chosen([busy, *LADDER[1:]]).replica_id == "on-device"


def test_a_burst_waits_a_little_at_home_before_another_replica_evicts_for_it() -> None:
    others = [replica(f"r{i}", 8, evictable=True) for i in range(9)]
    just_over = replica("home", 11, device=True)
    assert bounds_of([just_over, *others]).any < just_over.load
    assert chosen([just_over, *others]).replica_id == "home"
    assert chosen([replace(just_over, n_pending=20), *others]).replica_id != "home"


def test_when_everyone_is_overloaded_but_one_the_rest_follows_by_load() -> None:
    ranked = rank([replica("a", 80), replica("b", 90), replica("c", 0)], WANTED, 1)
    assert [r.replica_id for r in ranked] == ["c", "a", "b"]


def test_equal_prompts_meet_on_the_same_home_and_different_ones_spread() -> None:
    holders = [replica(f"r{i}", device=True) for i in range(6)]
    homes = [chosen(holders, prompt=prompt, n_homes=6).replica_id for prompt in range(1, 60)]
    again = [chosen(holders, prompt=prompt, n_homes=6).replica_id for prompt in range(1, 60)]
    assert homes == again
    assert len(set(homes)) == 6
    of_base = [chosen(holders, (), prompt).replica_id for prompt in range(1, 60)]
    assert len(set(of_base)) == 6
    assert of_base == [chosen(holders, (), prompt).replica_id for prompt in range(1, 60)]


def test_a_prompt_of_which_nothing_is_known_goes_to_the_least_loaded_home() -> None:
    fleet = [replica("a", 3, device=True), replica("b", 2, device=True), replica("c", 3)]
    assert chosen(fleet, prompt=0, n_homes=2).replica_id == "b"
    assert chosen(fleet, (), prompt=0).replica_id == "b"


def test_a_cold_adapter_has_one_home_whatever_the_prompt() -> None:
    empty = [replica(f"r{i}", free=True) for i in range(6)]
    assert len({chosen(empty, prompt=prompt).replica_id for prompt in range(40)}) == 1


def test_an_adapter_with_more_homes_than_holders_spreads_to_new_ones() -> None:
    fleet = [replica("r0", device=True), *(replica(f"r{i}", evictable=True) for i in range(1, 8))]
    one = {chosen(fleet, prompt=prompt).replica_id for prompt in range(40)}
    three = {chosen(fleet, prompt=prompt, n_homes=3).replica_id for prompt in range(1, 60)}
    assert one == {"r0"}
    assert len(three) == 3
    assert "r0" in three


def test_a_mixture_goes_where_most_of_it_has_room_and_never_half_way() -> None:
    both = ReplicaSnapshot("both", 1, 8, device=frozenset([DIGEST, OTHER]))
    one = ReplicaSnapshot("one", 0, 8, device=frozenset([DIGEST]), n_free_slots=1)
    none = ReplicaSnapshot("none", 0, 8, n_free_slots=1, n_evictable=0)
    fleet = [none, one, both]
    mixture = (DIGEST, OTHER)
    assert [r.location(mixture) for r in fleet] == [
        AdapterLocation.FULL,
        AdapterLocation.FREE_SLOT,
        AdapterLocation.DEVICE,
    ]
    assert [r.replica_id for r in rank(fleet, mixture, 3)] == ["both", "one", "none"]
    assert rank(fleet, (OTHER, DIGEST), 3) == rank(fleet, mixture, 3)


def test_room_is_counted_in_bytes_where_they_are_known() -> None:
    holder = ReplicaSnapshot(
        "holder", 80, 8, device=frozenset(WANTED), n_bytes={DIGEST: 100}, free_bytes=0
    )
    tight = ReplicaSnapshot("tight", 0, 8, n_free_slots=9, n_evictable=9, free_bytes=99)
    roomy = ReplicaSnapshot("roomy", 1, 8, n_free_slots=1, free_bytes=100)
    assert chosen([holder, tight, roomy]).replica_id == "roomy"
    assert tight.location(WANTED, 100) is AdapterLocation.EVICTABLE


def test_ranks_are_part_of_the_load() -> None:
    light = replace(replica("light", 2), n_pending_ranks=2 * 8)
    heavy = replace(replica("heavy", 2), n_pending_ranks=2 * 256)
    assert chosen([heavy, light], (), prompt=0).replica_id == "light"


def test_losing_one_replica_moves_only_its_own_adapters() -> None:
    fleet = [replica(f"r{i}", free=True) for i in range(8)]
    digests = [f"{i:064x}" for i in range(200)]
    before = {d: chosen(fleet, (d,)).replica_id for d in digests}
    after = {d: chosen(fleet[:-1], (d,)).replica_id for d in digests}
    moved = [d for d in digests if before[d] != after[d]]
    assert moved
    assert all(before[d] == "r7" for d in moved)


def test_one_more_home_moves_no_other_home() -> None:
    fleet = [replica(f"r{i}", free=True) for i in range(8)]

    def homes(n: int) -> set[str]:
        ranked = rank(fleet, WANTED, 1, n_homes=n)
        return {replica.replica_id for replica in ranked[:n]}

    assert all(homes(n) < homes(n + 1) for n in range(1, 8))


def test_the_base_model_is_resident_everywhere() -> None:
    assert chosen([replica("only")], (), 3).location(()) is AdapterLocation.DEVICE


def test_no_replica_no_choice() -> None:
    assert rank([], WANTED, 0) == []


@st.composite
def fleets(draw: st.DrawFn) -> list[ReplicaSnapshot]:
    digests = st.frozensets(st.sampled_from([DIGEST, OTHER, "x"]))
    return [
        ReplicaSnapshot(
            f"r{i:02d}",
            draw(st.integers(0, 60)),
            draw(st.integers(0, 16)),
            device=draw(digests),
            host=draw(digests),
            n_free_slots=draw(st.integers(0, 2)),
            n_evictable=draw(st.integers(0, 2)),
            free_bytes=draw(st.none() | st.integers(0, 200)),
            n_pending_ranks=draw(st.integers(0, 2000)),
            n_bytes=draw(st.sampled_from([{}, {DIGEST: 100}, {OTHER: 150}])),
        )
        for i in range(draw(st.integers(1, 10)))
    ]


wanted = st.sampled_from([(), WANTED, (OTHER,), (DIGEST, OTHER)])


@settings(deadline=None)
@given(fleet=fleets(), digests=wanted, prompt=st.integers(0, 2**64), n_homes=st.integers(1, 12))
def test_no_replica_over_its_bound_while_another_is_within(
    fleet: list[ReplicaSnapshot], digests: tuple[str, ...], prompt: int, n_homes: int
) -> None:
    bounds = bounds_of(fleet)
    ranked = rank(fleet, digests, prompt, n_homes=n_homes)
    first = ranked[0]
    assert first.load <= bounds.home
    if first.load > bounds.any:  # a home with a short queue: all others would have to evict
        within = [r for r in fleet if r.load <= bounds.any]
        n_bytes = sum(next((r.n_bytes[d] for r in fleet if d in r.n_bytes), 0) for d in digests)
        assert not any(r.has_room(digests, n_bytes) for r in within)
    assert sorted(r.replica_id for r in ranked) == [r.replica_id for r in fleet]


@settings(deadline=None)
@given(fleet=fleets(), digests=wanted, prompt=st.integers(1, 2**64), seed=st.randoms())
def test_neither_order_nor_a_replica_that_is_not_chosen_changes_the_choice(
    fleet: list[ReplicaSnapshot], digests: tuple[str, ...], prompt: int, seed: object
) -> None:
    first = chosen(fleet, digests, prompt)
    shuffled = list(fleet)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(shuffled, digests, prompt) is first


@pytest.mark.parametrize("n", [1, 2, 10])
def test_an_idle_fleet_is_never_over_its_bound(n: int) -> None:
    fleet = [replica(f"r{i}", n_pending=1) for i in range(n)]
    assert all(r.load <= bounds_of(fleet).any for r in fleet)
