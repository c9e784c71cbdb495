"""Paged attention and the cache writes equal the reference, with a row's bits fixed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex_kernels.reference.model_ops import (
    paged_attention_reference,
    read_kv,
    rope_and_cache_reference,
    write_kv_reference,
)
from loraplex_kernels.triton import attention
from loraplex_kernels.triton.attention import paged_attention_triton
from loraplex_kernels.triton.kv_cache import rope_and_cache_triton, write_kv_triton

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Step:
    """On the device, its cache laid out as a GPU has it; ``on_cpu`` as the reference reads it."""

    on_cpu: tuple[Tensor, ...]  # q, caches, page table, starts, lengths
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    query_starts: Tensor
    kv_lens: Tensor

    def only(self, request: int) -> Step:
        first, last = self.query_starts[request : request + 2].tolist()
        return Step(
            self.on_cpu,
            self.q[first:last],
            self.k_cache,
            self.v_cache,
            self.page_table[request : request + 1],
            torch.tensor([0, last - first], dtype=torch.int32, device=self.q.device),
            self.kv_lens[request : request + 1],
        )


def _step(
    device: torch.device,
    dtype: torch.dtype,
    *,
    lens: list[int],
    queries: list[int],
    n_heads: int = 6,
    n_kv: int = 2,
    head_dim: int = 16,
    page_size: int = 8,
    cache_dtype: torch.dtype | None = None,  # None: dtype
) -> Step:
    generator = torch.Generator().manual_seed(7)
    pages = [-(-length // page_size) for length in lens]
    n_pages, widest = sum(pages) + 1, max(pages) + 1
    order = torch.randperm(n_pages, generator=generator)
    table = torch.zeros(len(lens), widest, dtype=torch.int32)
    first = 0
    for request, count in enumerate(pages):
        table[request, :count] = order[first : first + count]
        first += count
    shape = (n_pages, n_kv, page_size, head_dim)
    k_cache = torch.full(shape, float("nan"), dtype=cache_dtype or dtype)
    v_cache = k_cache.clone()
    for request, length in enumerate(lens):
        place = torch.arange(length)
        slots = table[request].long()[place // page_size] * page_size + place % page_size
        k, v = torch.randn(2, length, n_kv, head_dim, generator=generator).to(dtype)
        write_kv_reference(k, v, k_cache, v_cache, slots)
    q = torch.randn(sum(queries), n_heads, head_dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    on_cpu = (q, k_cache, v_cache, table, starts, torch.tensor(lens, dtype=torch.int32))
    rows = _as_rows(k_cache, v_cache)
    return Step(on_cpu, *(tensor.to(device) for tensor in (q, *rows, *on_cpu[3:])))


def _as_rows(k_cache: Tensor, v_cache: Tensor) -> list[Tensor]:
    """The reference's caches of a CPU as a GPU has them: a row for each position."""
    n_pages, n_kv, page_size, head_dim = k_cache.shape
    both = read_kv(k_cache, v_cache, torch.arange(n_pages * page_size))
    return [
        cache.view(n_pages, page_size, n_kv, head_dim).transpose(1, 2).contiguous()
        for cache in both
    ]


def _attend(
    step: Step,
    *,
    window: int | None = None,
    softcap: float | None = None,
    batch_invariant: bool = True,
) -> Tensor:
    """A row that is left out is NaN, not what freed memory holds of an earlier result."""
    return paged_attention_triton(
        step.q,
        step.k_cache,
        step.v_cache,
        step.page_table,
        step.query_starts,
        step.kv_lens,
        scale=0.25,
        window=window,
        softcap=softcap,
        out=torch.full_like(step.q, float("nan")),
        batch_invariant=batch_invariant,
    )


def _assert_close(
    out: Tensor, step: Step, *, window: int | None = None, softcap: float | None = None
) -> None:
    expected = paged_attention_reference(
        *step.on_cpu, scale=0.25, window=window, softcap=softcap
    ).double()
    limit = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[out.dtype]
    assert float((out.double().cpu() - expected).abs().max()) < limit


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a group has several splits."""
    monkeypatch.setattr(attention, "SPLIT_POSITIONS", 64)
    monkeypatch.setattr(attention, "N_GROUPS", 2)


@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1), (16, 1)])
@pytest.mark.parametrize("queries", [[1] * 5, [1] * 40, [3] * 4, [0, 0, 1], [2, 0, 0, 0, 1]])
def test_every_request_has_a_program(
    device: torch.device, heads: tuple[int, int], queries: list[int]
) -> None:
    """A step of more requests than a tile has queries; requests without queries between others."""
    lens = [max(1, n) + 9 * (place % 3) for place, n in enumerate(queries)]
    step = _step(device, torch.float32, lens=lens, queries=queries, n_heads=heads[0], n_kv=heads[1])
    _assert_close(_attend(step), step)


@settings(max_examples=12, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 150)), min_size=1, max_size=4
    ).filter(lambda requests: any(n for n, _ in requests)),
    heads=st.sampled_from([(6, 2), (4, 4), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([16, 24, 64]),
    page_size=st.sampled_from([2, 16, 64]),
    window=st.sampled_from([None, 1, 20]),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    few_rows=st.sampled_from([0, 256]),  # 0: as large steps, where only some requests are divided
    few_queries=st.sampled_from([0, 3, 8]),
    batch_invariant=st.booleans(),
)
def test_decode_and_prefill_rows_equal_the_reference(
    device: torch.device,
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    few_rows: int,
    few_queries: int,
    batch_invariant: bool,
) -> None:
    step = _step(
        device,
        dtype,
        lens=[max(1, queries) + cached for queries, cached in requests],
        queries=[queries for queries, _ in requests],
        n_heads=heads[0],
        n_kv=heads[1],
        head_dim=head_dim,
        page_size=page_size,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_FEW_ROWS", few_rows)
        patch.setattr(attention, "_FEW_QUERIES", few_queries)
        patch.setattr(attention, "_widest_tile", lambda _: 64)
        out = _attend(step, window=window, softcap=softcap, batch_invariant=batch_invariant)
    _assert_close(out, step, window=window, softcap=softcap)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 70)])
def test_a_row_has_the_same_bits_alone_divided_and_whole(
    device: torch.device,
    dtype: torch.dtype,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = _step(device, dtype, lens=[260, 33, 70], queries=[1, 20, 3])
    together = _attend(step, window=window)
    _assert_close(together, step, window=window)
    for request in range(3):
        first, last = step.query_starts[request : request + 2].tolist()
        alone = _attend(step.only(request), window=window)
        assert torch.equal(alone, together[first:last])
    # None is divided; those of up to 3 queries, by request; all, by row.
    for few_queries, per_request in ((0, 0), (3, 3), (20, 0)):
        monkeypatch.setattr(attention, "_FEW_ROWS", 0)
        monkeypatch.setattr(attention, "_FEW_QUERIES", few_queries)
        division = attention.Division.of(24, 3, step.page_table.shape[1] * 8)
        assert division.per_request == per_request
        assert torch.equal(_attend(step, window=window), together)


@pytest.mark.parametrize(("dtype", "window"), [(torch.bfloat16, None), (torch.float16, 70)])
def test_an_fp8_cache_gives_what_the_reference_gives(
    device: torch.device, dtype: torch.dtype, window: int | None
) -> None:
    shape = {"lens": [260, 33, 70], "queries": [1, 20, 3], "head_dim": 24}
    step = _step(device, dtype, **shape, cache_dtype=FP8)
    assert (step.q.dtype, step.k_cache.dtype) == (dtype, FP8)
    found = _attend(step, window=window)
    _assert_close(found, step, window=window)
    # The rounding of keys and values, of which docs/gpu.md says how large it is.
    in_16_bits = _attend(_step(device, dtype, **shape), window=window).double()
    difference = (found.double() - in_16_bits).pow(2).mean().sqrt()
    assert 0.005 < float(difference / in_16_bits.pow(2).mean().sqrt()) < 0.05
    for request in range(3):
        first, last = step.query_starts[request : request + 2].tolist()
        assert torch.equal(_attend(step.only(request), window=window), found[first:last])


def test_large_steps_may_take_larger_tiles(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FEW_ROWS", 0)
    step = _step(device, torch.bfloat16, lens=[90, 33, 70], queries=[70, 1, 3])
    assert [attention._widest_tile(each) for each in (80, 90, 100, 120)] == [32, 64, 64, 32]
    monkeypatch.setattr(attention, "_widest_tile", lambda _: 64)
    _assert_close(_attend(step, batch_invariant=False), step)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.nightly)]
)
def test_up_to_as_many_splits_as_groups_each_is_a_group_of_its_own(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So how many groups there may be changes nothing there."""
    step = _step(device, dtype, lens=[230, 40], queries=[1, 2])
    monkeypatch.setattr(attention, "N_GROUPS", 4)
    four = _attend(step)
    monkeypatch.setattr(attention, "N_GROUPS", 16)
    assert torch.equal(_attend(step), four)


def test_padded_requests_and_rows_are_left_alone(device: torch.device) -> None:
    step = _step(device, torch.float32, lens=[30, 12, 1], queries=[1, 1, 0])
    q = torch.cat((step.q, torch.full((3, 6, 16), float("nan"), device=device)))
    out = torch.full_like(q, 7.0)
    paged_attention_triton(
        q,
        step.k_cache,
        step.v_cache,
        step.page_table,
        step.query_starts,
        step.kv_lens,
        scale=0.25,
        out=out,
    )
    assert torch.equal(out[:2], _attend(step))
    assert bool((out[2:] == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", [24, 8, 0])
def test_rope_and_cache_rotates_and_writes_as_the_reference(
    device: torch.device, dtype: torch.dtype, rotary: int
) -> None:
    n_heads, n_kv, head_dim, page_size = 3, 2, 24, 8
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, (n_heads + 2 * n_kv) * head_dim, generator=generator).to(dtype)
    angles = torch.randn(40, rotary // 2, generator=generator).repeat(1, 2)
    cos, sin = (angles.cos(), angles.sin()) if rotary else (None, None)
    positions = torch.tensor([0, 3, 39, 7, 1])
    slots = torch.tensor([5, -1, 17, 30, 0])
    shape = (4, n_kv, page_size, head_dim)
    wanted = [rows.clone(), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)]
    rope_and_cache_reference(wanted[0], cos, sin, positions, wanted[1], wanted[2], slots)
    wanted[1:] = _as_rows(*wanted[1:])
    got = [rows.clone().to(device), *(torch.zeros(shape, dtype=dtype, device=device),) * 1]
    got.append(torch.zeros(shape, dtype=dtype, device=device))
    moved = [None if angle is None else angle.to(device) for angle in (cos, sin)]
    rope_and_cache_triton(got[0], *moved, positions.to(device), *got[1:], slots.to(device))
    limit = 1e-6 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=limit, rtol=limit)


def test_write_kv_skips_negative_slots_and_takes_strided_rows(device: torch.device) -> None:
    packed = torch.randn(4, 4, 16).to(torch.bfloat16)
    slots = torch.tensor([9, -1, 0, 15])
    caches = [torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16) for _ in range(2)]
    write_kv_reference(packed[:, :2], packed[:, 2:], *caches, slots)
    mine = [torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16, device=device) for _ in range(2)]
    moved = packed.to(device)
    write_kv_triton(moved[:, :2], moved[:, 2:], *mine, slots.to(device))
    for cache, expected in zip(mine, _as_rows(*caches), strict=True):
        assert torch.equal(cache.cpu(), expected)


def test_an_fp8_cache_holds_the_nearest_codes_of_all_bf16_values(device: torch.device) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = values.where(~values.isnan(), 0.0).view(32, 8, 256)
    slots = torch.arange(32)
    mine = [torch.zeros(2, 8, 16, 256, dtype=FP8, device=device) for _ in range(2)]
    write_kv_triton(values.to(device), values.flip(0).to(device), *mine, slots.to(device))
    wanted = [torch.zeros(2, 8, 16, 256, dtype=FP8) for _ in range(2)]
    write_kv_reference(values, values.flip(0), *wanted, slots)
    for cache, expected in zip(mine, _as_rows(*wanted), strict=True):
        assert torch.equal(cache.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert float(mine[0].float().max()) == 448


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    step = _step(device, torch.float32, lens=[8], queries=[1])
    with pytest.raises(ValueError, match="starts"):
        paged_attention_triton(
            step.q,
            step.k_cache,
            step.v_cache,
            step.page_table,
            step.query_starts[:1],
            step.kv_lens,
            scale=1.0,
        )
    with pytest.raises(ValueError, match="power of two"):
        write_kv_triton(
            step.q[:, :2],
            step.q[:, :2],
            torch.zeros(1, 2, 3, 16, device=device),
            torch.zeros(1, 2, 3, 16, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
