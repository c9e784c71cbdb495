"""Exponent-coded pages: what comes out of them is what went in, and no result depends on them."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.cpu.exponent_coding import (
    EXPONENT_CODED,
    encode_rows,
    prefers_coded_pages,
)
from loraplex_kernels.formats.factors import AdapterFactors, SliceFactors
from loraplex_kernels.formats.layout import LoraSegments, LoraTarget
from loraplex_kernels.layers.model_ops import silu_mul
from loraplex_kernels.layers.packed_linear import PackedLinear
from loraplex_kernels.lora.experts import StepPairs, group_pairs
from loraplex_kernels.lora.ops import PreparedTarget
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.segments import build_segments, expand_routed
from tests.support.coded_rows import decode_rows

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler built the kernels")
BF16 = torch.bfloat16
# Widths that coded pages have and one that they have not; `up` is gated.
UP, DOWN = LoraTarget("up", 128, (192, 192)), LoraTarget("down", 192, (128,))
ODD = LoraTarget("odd", 832, (2112, 40))  # more than one column block and `expand` call
RANKS = [(16, 16), (3, 40), (8, 0), (0, 1), (128, 17), (5, 5), (100, 12), (1, 8)]


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int16)


@settings(max_examples=200, deadline=None)
@given(
    n_rows=st.integers(1, 17),
    width=st.sampled_from([64, 128, 832]),
    upper_bytes=st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 10_000),
)
def test_any_bits_come_back_from_rows_of_at_most_sixteen_upper_bytes(
    n_rows: int, width: int, upper_bytes: list[int], seed: int
) -> None:
    """Zeros, subnormal numbers, infinities and NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(upper_bytes), (n_rows, width), generator=generator)
    low = torch.randint(256, (n_rows, width), generator=generator)
    words = torch.tensor(upper_bytes)[drawn] << 8 | low
    rows = words.to(torch.int16).view(BF16)
    made = encode_rows(rows)
    if n_rows % 2:
        assert made is None
        return
    if max(len(part.unique()) for row in drawn for part in row.split(768)) > 16:
        assert made is None
        return
    assert made is not None
    assert made.nbytes == n_rows * (16 * -(-width // 768) + width * 3 // 2)
    storage = torch.cat([torch.zeros(7, dtype=BF16), made])
    found = decode_rows(storage, 7, n_rows, width)
    assert torch.equal(bits(found), bits(rows))


def test_what_cannot_be_coded_is_left_or_refused() -> None:
    assert encode_rows(torch.zeros(4, 96, dtype=BF16)) is None
    with pytest.raises(ValueError, match="bfloat16"):
        encode_rows(torch.zeros(4, 64))
    assert not prefers_coded_pages(torch.float32, torch.device("cpu"))
    assert not prefers_coded_pages(BF16, torch.device("meta"))


def test_the_bytes_are_those_of_forms_on_disk() -> None:
    """Where this fails, count ``_FORMAT`` of ``adapter_packer.py`` up and write the new digest."""
    rows = torch.linspace(-1, 1, 6 * 128).view(6, 128).to(BF16)
    coded = encode_rows(rows)
    assert coded is not None
    digest = hashlib.sha256(coded.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest[:16] == "7eb828c2b1119965"


def factors(ranks: tuple[int, int], seed: int) -> AdapterFactors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def one(target: LoraTarget, i: int, rank: int) -> SliceFactors | None:
        width = target.out_features[i]
        if rank == 0:
            return None
        b = draw(width, rank)
        if seed % 3 == 0:  # a second page of more upper bytes than fit: plain beside coded ones
            b[:, -1] *= 2.0 ** torch.linspace(-30, 0, width)
        vectors = (draw(width), draw(width)) if seed % 2 else (None, None)
        return SliceFactors(draw(rank, target.in_features), b, *vectors)

    return {
        "up": (one(UP, 0, ranks[0]), one(UP, 1, ranks[1])),
        "down": (one(DOWN, 0, ranks[1]),),
        "odd": (one(ODD, 0, ranks[0]), one(ODD, 1, ranks[1])),
    }


def make_pool(*, coded: bool) -> LoraPool:
    pool = LoraPool([UP, DOWN, ODD], n_bytes=4 << 20, n_slots=8, dtype=BF16, exponent_coding=coded)
    for seed, ranks in enumerate(RANKS):
        slot = pool.reserve(pool.pack(factors(ranks, seed)))
        pool.fill(slot)
        pool.publish(slot)
    return pool


PLAIN, CODED = (make_pool(coded=coded) for coded in (False, True))


def test_a_coded_pool_holds_the_same_values_in_fewer_bytes() -> None:
    assert CODED.bytes_used < 0.85 * PLAIN.bytes_used
    kept = {True: 0, False: 0}
    for name, target in PLAIN.targets.items():
        plain, small = PLAIN.tables(name), CODED.tables(name)
        assert torch.equal(plain.ranks, small.ranks)
        in_features = (target.in_features,) * target.n_slices
        kinds = [
            (plain.a_pages, small.a_pages, in_features),
            (plain.b_pages, small.b_pages, target.out_features),
        ]
        for of_plain, of_coded, width in kinds:
            for slot, i, page in (of_plain >= 0).nonzero().tolist():
                n_rows = min(16, int(plain.ranks[slot, i]) - 16 * page)
                first = int(of_plain[slot, i, page])
                values = PLAIN.storage[first : first + n_rows * width[i]].view(n_rows, width[i])
                at = int(of_coded[slot, i, page])
                kept[bool(at & EXPONENT_CODED)] += 1
                if at & EXPONENT_CODED:
                    at -= EXPONENT_CODED
                    found = decode_rows(CODED.storage, at, n_rows, width[i])
                else:
                    found = CODED.storage[at : at + n_rows * width[i]].view(n_rows, width[i])
                assert torch.equal(bits(found), bits(values))
    assert kept[True] > 2 * kept[False] > 10  # both kinds, side by side


def test_the_space_of_a_coded_slot_comes_back() -> None:
    pool = make_pool(coded=True)
    for slot in pool.slots:
        pool.remove(slot)
    assert pool.bytes_used == 0
    assert all((pool.tables(name).a_pages == -1).all() for name in pool.targets)


def mixed_segments(mix: str, n_rows: int, seed: int) -> LoraSegments:
    generator = torch.Generator().manual_seed(seed)
    if mix == "routed":
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(n_rows)])
        return expand_routed(ids.int(), torch.rand(n_rows, 2, generator=generator))
    if mix == "distinct":
        return build_segments((torch.arange(n_rows) % 8).int())
    if mix == "one":
        return build_segments(torch.full((n_rows,), 6, dtype=torch.int32))
    return build_segments(torch.randint(-1, 8, (n_rows,), generator=generator).int())


@pytest.mark.usefixtures("kernel_set")
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["up", "down", "odd"]),
    mix=st.sampled_from(["distinct", "one", "any", "routed"]),
    n_rows=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33, 70, 200]),
    seed=st.integers(0, 1000),
)
def test_every_instruction_set_gives_the_bits_of_a_plain_pool(
    name: str, mix: str, n_rows: int, seed: int
) -> None:
    target, segments = PLAIN.targets[name], mixed_segments(mix, n_rows, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, target.in_features, generator=generator).to(BF16)
    base = torch.randn(n_rows, sum(target.out_features), generator=generator).to(BF16)
    results = []
    for pool in (PLAIN, CODED):
        out = base.clone()
        PreparedTarget(pool, name)(x, segments, out)
        results.append(out)
    assert torch.equal(*results)
    assert mix != "one" or not torch.equal(results[0], base)


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("n_rows", [1, 5, 16, 150])
@pytest.mark.parametrize("mix", ["distinct", "one", "any"])
def test_over_the_base_and_for_routed_experts_too(mix: str, n_rows: int) -> None:
    torch.manual_seed(n_rows)
    up = PackedLinear([torch.randn(192, 128).to(BF16) for _ in range(2)], [None, None])
    down = PackedLinear([torch.randn(128, 192).to(BF16)], [torch.randn(128)])
    x, act = torch.randn(n_rows, 128).to(BF16), torch.randn(n_rows, 192).to(BF16)
    rows = torch.arange(n_rows)
    pairs = StepPairs(rows.repeat_interleave(2), ((rows, 2),))
    ids = torch.full((2 * n_rows,), 6) if mix == "one" else torch.randint(8, (2 * n_rows,))
    grouped = group_pairs(ids.int(), torch.rand(2 * n_rows), 8)
    routed = LoraSegments(torch.arange(8).int(), grouped.indptr, grouped.indices, grouped.weights)
    segments, results = mixed_segments(mix, n_rows, 1), []
    for pool in (PLAIN, CODED):
        of_up, of_down = PreparedTarget(pool, "up"), PreparedTarget(pool, "down")
        base, expert_act = of_up.moe_gate_up(up, silu_mul, x, pairs, routed)
        gathered = of_down.moe_down(down, act, expert_act, pairs, routed)
        results.append((of_up.linear_with_lora(up, x, segments), base, expert_act, gathered))
    for plain, small in zip(*results, strict=True):
        assert torch.equal(plain, small)
