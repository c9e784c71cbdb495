"""The paged pool: nothing leaks, nothing overlaps, true ranks take true bytes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.errors import BadFactors, PoolFull
from loraplex_kernels.formats.factors import AdapterFactors, SliceFactors
from loraplex_kernels.formats.layout import LoraTarget
from loraplex_kernels.lora.extents import ExtentAllocator
from loraplex_kernels.lora.pool import LoraPool, pool_bytes
from loraplex_kernels.lora.segments import build_segments, expand_routed, group_runs

TARGETS = [LoraTarget("qkv", 576, (576, 192, 192)), LoraTarget("down", 1536, (576,))]


def factors_of(rank: int, *, names: tuple[str, ...] = ("qkv", "down")) -> AdapterFactors:
    return {
        target.name: tuple(
            SliceFactors(torch.randn(rank, target.in_features), torch.randn(width, rank))
            for width in target.out_features
        )
        for target in TARGETS
        if target.name in names
    }


def reserve_or_none(pool: LoraPool, factors: AdapterFactors) -> int | None:
    try:
        return pool.reserve(pool.pack(factors))
    except PoolFull:
        return None


def make_pool(n_bytes: int = 4 << 20, n_slots: int = 64) -> LoraPool:
    return LoraPool(TARGETS, n_bytes=n_bytes, n_slots=n_slots, dtype=torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60), seed=st.integers(0, 1000))
def test_extents_never_overlap_and_all_come_back(sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    allocator = ExtentAllocator(300)
    taken: dict[int, int] = {}
    for size in sizes:
        if taken and rng.random() < 0.4:
            start = rng.choice(list(taken))
            allocator.free(start, taken.pop(start))
        start_or_none = allocator.take(size)
        if start_or_none is None:
            assert all(length < size for length, _ in allocator._by_size)
            continue
        new = range(start_or_none, start_or_none + size)
        assert new.stop <= 300
        assert all(new.stop <= s or s + n <= new.start for s, n in taken.items())
        taken[new.start] = size
        assert allocator.n_free == 300 - sum(taken.values())
    for start, size in taken.items():
        allocator.free(start, size)
    assert allocator.n_free == 300
    assert allocator.take(300) == 0


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([1, 4, 8, 16, 24, 64, 100]), min_size=4, max_size=30),
    seed=st.integers(0, 1000),
)
def test_a_pool_under_churn_loses_nothing_and_mixes_nothing_up(ranks: list[int], seed: int) -> None:
    rng = random.Random(seed)
    pool = make_pool(n_bytes=2 << 20)
    held: dict[int, int] = {}
    for rank in ranks:
        factors = factors_of(rank)
        needed = pool.pack(factors).n_bytes
        true_bytes = rank * (3 * 576 + 960 + 1536 + 576) * 2
        assert true_bytes <= needed <= true_bytes * 1.1
        while (slot := reserve_or_none(pool, factors)) is None:
            # Pages fill the gaps: an adapter is refused for want of bytes, not of their place.
            assert pool.bytes_total - pool.bytes_used < needed + pool.bytes_total // 10
            if not held:
                return
            victim = rng.choice(list(held))
            used = pool.bytes_used
            assert pool.remove(victim) == used - pool.bytes_used
            del held[victim]
        pool.fill(slot)
        pool.publish(slot)
        held[slot] = rank
        for other, other_rank in held.items():
            assert pool.tables("down").ranks[other].tolist() == [other_rank]
        page = int(pool.tables("down").a_pages[slot, 0, 0])
        a = factors["down"][0]
        assert a is not None
        assert a.a is not None
        assert torch.equal(pool.storage[page : page + 1536], a.a[0].bfloat16())
    for slot in list(held):
        pool.remove(slot)
        assert not pool.tables("qkv").ranks[slot].any()
        assert (pool.tables("qkv").a_pages[slot] == -1).all()
    assert pool.bytes_used == 0


def test_slots_of_a_group_are_consecutive_and_all_or_nothing() -> None:
    pool = make_pool(n_bytes=1 << 20, n_slots=8)
    first = [pool.reserve(pool.pack(factors_of(1))) for _ in range(3)]
    pool.remove(first[1])
    group = pool.reserve_group([pool.pack(factors_of(2))] * 4)
    assert group == (3, 4, 5, 6)
    used = pool.bytes_used
    with pytest.raises(PoolFull) as full:
        pool.reserve_group([pool.pack(factors_of(2))] * 2)
    assert full.value.free_slots == 2
    with pytest.raises(PoolFull):
        pool.reserve_group([pool.pack(factors_of(60))] * 2)
    assert pool.bytes_used == used
    assert pool.reserve(pool.pack(factors_of(1))) == 1


def test_a_group_takes_the_slots_that_another_pool_chose() -> None:
    pool = make_pool(n_slots=8)
    packed = pool.pack(factors_of(2))
    assert pool.reserve_group([packed] * 2, first=3) == (3, 4)
    with pytest.raises(ValueError, match="from 4 on"):
        pool.reserve_group([packed], first=4)
    assert pool.reserve_group([packed]) == (0,)
    assert pool.slots == (0, 3, 4)


def test_factors_that_do_not_fit_are_refused_by_name() -> None:
    pool = make_pool()
    a, b = torch.randn(4, 1536), torch.randn(576, 4)
    with pytest.raises(BadFactors, match=r"unknown targets \['up'\]"):
        pool.pack({"up": (SliceFactors(a, b),)})
    with pytest.raises(BadFactors, match="only one of its two factors"):
        pool.pack({"down": (SliceFactors(a, None),)})
    with pytest.raises(BadFactors, match=r"down\[0\].b has shape \(576, 5\), needs \(576, 4\)"):
        pool.pack({"down": (SliceFactors(a, torch.randn(576, 5)),)})
    with pytest.raises(BadFactors, match="3 slices, got 1"):
        pool.pack({"qkv": (None,)})
    assert pool.bytes_used == 0


def test_a_slot_without_factors_takes_no_bytes() -> None:
    pool = make_pool()
    slot = pool.reserve(pool.pack({"qkv": (None, SliceFactors(bias=torch.ones(192)), None)}))
    pool.publish(slot)
    assert pool.bytes_used == 192 * 2
    assert pool.remove(slot) == 192 * 2


@given(
    slots=st.lists(st.integers(-1, 5), max_size=40),
    routed=st.booleans(),
)
def test_rows_are_grouped_by_their_slots_in_order(slots: list[int], routed: bool) -> None:
    if routed:
        slots = slots[: len(slots) // 2 * 2]
        table = torch.tensor(slots, dtype=torch.int32).view(-1, 2)
        weights = torch.rand(table.shape)
        found = expand_routed(table, weights)
    else:
        found = build_segments(torch.tensor(slots, dtype=torch.int32))
    assert found.slots.tolist() == sorted({slot for slot in slots if slot >= 0})
    assert found.indptr[0] == 0
    for s, slot in enumerate(found.slots.tolist()):
        pairs = [i for i, e in enumerate(slots) if e == slot]
        segment = slice(int(found.indptr[s]), int(found.indptr[s + 1]))
        assert found.indices[segment].tolist() == [i // (2 if routed else 1) for i in pairs]
        if routed:
            assert found.weights is not None
            assert torch.equal(found.weights[segment], weights.flatten()[pairs])


@given(runs=st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 4)), max_size=12))
def test_runs_are_grouped_as_their_rows_are(runs: list[tuple[int, int]]) -> None:
    found = group_runs([slot for slot, _ in runs], [n for _, n in runs])
    row_slots = [slot for slot, n in runs for _ in range(n)]
    expected = build_segments(torch.tensor(row_slots, dtype=torch.int32))
    for name in ("slots", "indptr", "indices"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == torch.int32
        assert torch.equal(one, other)


def test_tensors_beside_the_slots_keep_their_values_and_give_their_space_back() -> None:
    pool = make_pool(n_bytes=1 << 18)
    factors = pool.pack(factors_of(8, names=("down",)))
    like = [
        (torch.randn(5, 7), torch.bfloat16),
        (torch.arange(9), torch.int64),
        (torch.empty(0, 4), torch.bfloat16),
        (torch.randn(3), torch.float32),
    ]
    taken = pool.reserve_tensors(like)
    slot = pool.reserve(factors)
    for target, (source, dtype) in zip(taken.tensors, like, strict=True):
        assert target.dtype is dtype
        target.copy_(source)
    pool.fill(slot)
    assert pool.bytes_used == pool_bytes(like) + factors.n_bytes
    for target, (source, dtype) in zip(taken.tensors, like, strict=True):
        assert torch.equal(target, source.to(dtype))
    assert pool.release_tensors(taken) == pool_bytes(like) == 128 + 128 + 64
    pool.remove(slot)
    assert pool.bytes_used == 0


def test_tensors_that_do_not_fit_take_nothing() -> None:
    pool = make_pool(n_bytes=1 << 12)
    with pytest.raises(PoolFull):
        pool.reserve_tensors([(torch.empty(1024), torch.float32), (torch.empty(1), torch.float32)])
    assert pool.bytes_used == 0
