"""Paged attention against PyTorch's, over random page tables, and its bits in any chunking."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.layers.model_ops import paged_attention, write_kv
from loraplex_kernels.reference.model_ops import (
    block_attention_reference,
    paged_attention_reference,
)

DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Requests with contiguous keys of their own and their scattered copy in pages."""

    q: Tensor
    keys: list[Tensor]  # of each request [kv_len, n_kv_heads, head_dim]
    values: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    query_starts: Tensor
    kv_lens: Tensor

    def run(self, **options: object) -> Tensor:
        return self._call(paged_attention, self.q, self.k_cache, self.v_cache, options)

    def reference(self, dtype: torch.dtype, **options: object) -> Tensor:
        caches = (self.k_cache, self.v_cache)
        if dtype == torch.float64 and self.k_cache.element_size() == 4:
            caches = (self.k_cache.double(), self.v_cache.double())
        return self._call(paged_attention_reference, self.q.to(dtype), *caches, options)

    def _call(self, function, q, k_cache, v_cache, options):  # type: ignore[no-untyped-def]
        scale = q.shape[-1] ** -0.5
        return function(
            q,
            k_cache,
            v_cache,
            self.page_table,
            self.query_starts,
            self.kv_lens,
            scale=scale,
            **options,
        )


def build(
    spans: list[tuple[int, int]],  # (kv_len, n_queries) of each request
    dtype: torch.dtype,
    *,
    n_heads: int = 9,
    n_kv_heads: int = 3,
    head_dim: int = 64,
    page_size: int = 16,
    seed: int = 0,
    is_int8: bool = False,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    need = [-(-kv_len // page_size) for kv_len, _ in spans]
    n_pages = sum(need) + 2
    order = torch.randperm(n_pages, generator=g).int()
    table = torch.full((len(spans), max(need) + 1), -1, dtype=torch.int32)
    # What no request wrote must not be read: a page may hold another's NaN.
    k_cache = torch.full((n_pages, n_kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    if is_int8:  # bytes of -1 are scales of NaN
        k_cache = torch.full((*k_cache.shape[:3], head_dim + 2), -1, dtype=torch.int8)
    v_cache = k_cache.clone()
    keys, values, used = [], [], 0
    for r, (kv_len, _) in enumerate(spans):
        table[r, : need[r]] = order[used : used + need[r]]
        used += need[r]
        k = torch.randn(kv_len, n_kv_heads, head_dim, generator=g).to(dtype)
        v = torch.randn(kv_len, n_kv_heads, head_dim, generator=g).to(dtype)
        place = torch.arange(kv_len)
        write_kv(
            k,
            v,
            k_cache,
            v_cache,
            table[r].long()[place // page_size] * page_size + place % page_size,
        )
        keys.append(k)
        values.append(v)
    n_queries = [n for _, n in spans]
    starts = torch.tensor([0, *n_queries]).cumsum(0).int()
    q = torch.randn(sum(n_queries), n_heads, head_dim, generator=g).to(dtype)
    lens = torch.tensor([kv_len for kv_len, _ in spans], dtype=torch.int32)
    return Case(q, keys, values, k_cache, v_cache, table, starts, lens)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 3e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "heads", [(9, 3, 64, 16), (4, 4, 32, 16), (8, 1, 80, 32), (4, 2, 128, 16), (2, 1, 24, 8)]
)
def test_decode_and_prefill_rows_equal_scaled_dot_product_attention(
    dtype: torch.dtype, heads: tuple[int, int, int, int]
) -> None:
    n_heads, n_kv_heads, head_dim, page_size = heads
    spans = [(1, 1), (7, 7), (17, 1), (129, 60), (300, 300), (64, 1), (65, 0)]
    case = build(
        spans,
        dtype,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )
    got = case.run()
    for r, (kv_len, n_queries) in enumerate(spans):
        if n_queries == 0:
            continue
        rows = slice(int(case.query_starts[r]), int(case.query_starts[r + 1]))
        seen = torch.ones(n_queries, kv_len, dtype=torch.bool).tril(kv_len - n_queries)
        q, k, v = (t.double().transpose(0, 1) for t in (case.q[rows], case.keys[r], case.values[r]))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True
        )[0].transpose(0, 1)
        torch.testing.assert_close(got[rows].double(), expected, **tolerance(dtype))


@pytest.mark.parametrize(("window", "seen_from"), [(None, None), (5, None), (30, None), (5, 40)])
def test_queries_within_a_block_see_all_of_it(window: int | None, seen_from: int | None) -> None:
    case = build([(70, 12)], torch.float32)
    first, end = 50, 62  # the block's 8 last keys come after the queries
    got = block_attention_reference(
        case.q,
        case.k_cache,
        case.v_cache,
        case.page_table[0],
        first,
        70,
        scale=0.125,
        window=window,
        seen_from=seen_from,
    )
    own, place = torch.arange(first, end)[:, None], torch.arange(70)
    seen = torch.ones(12, 70, dtype=torch.bool) if window is None else place > own - window
    if seen_from is not None:
        seen |= place >= seen_from
    q, k, v = (t.transpose(0, 1)[None] for t in (case.q, case.keys[0], case.values[0]))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(got, expected[0].transpose(0, 1), **tolerance(torch.float32))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (40, None), (None, 5.0), (70, 20.0)])
def test_windows_and_softcaps_equal_the_reference(
    dtype: torch.dtype, window: int | None, softcap: float | None, is_int8: bool
) -> None:
    case = build([(300, 300), (129, 1), (5, 3)], dtype, is_int8=is_int8)
    got = case.run(window=window, softcap=softcap)
    wide = torch.float64 if dtype == torch.float32 else dtype
    expected = case.reference(wide, window=window, softcap=softcap)
    torch.testing.assert_close(got.to(wide), expected, **tolerance(dtype))


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_a_window_has_passed_may_hold_anothers_nan(
    dtype: torch.dtype, is_int8: bool, each_kernel_set: Iterator[str]
) -> None:
    case = build([(300, 3)], dtype, is_int8=is_int8)
    expected, by_reference = case.run(window=70), case.reference(dtype, window=70)
    passed = case.page_table[0, : (300 - 3 + 1 - 70) // 16].long()
    for cache in (case.k_cache, case.v_cache):
        cache[passed] = -1 if is_int8 else float("nan")  # bytes of -1 are scales of NaN
    assert torch.equal(case.reference(dtype, window=70), by_reference)
    for _ in each_kernel_set:
        torch.testing.assert_close(case.run(window=70), expected, **tolerance(dtype))


def test_a_sink_takes_its_share_of_each_heads_softmax() -> None:
    case = build([(40, 40), (129, 1)], torch.float32)
    n_heads, n_kv_heads, width = case.q.shape[1], case.k_cache.shape[1], case.q.shape[2]
    sinks = torch.linspace(-2, 4, n_heads)
    got = case.run(sinks=sinks)
    without = case.run(sinks=torch.full((n_heads,), -torch.inf))
    torch.testing.assert_close(without, case.run(), atol=1e-5, rtol=1e-4)
    for r, (kv_len, n_queries) in enumerate([(40, 40), (129, 1)]):
        rows = slice(int(case.query_starts[r]), int(case.query_starts[r + 1]))
        keys = case.keys[r].repeat_interleave(n_heads // n_kv_heads, 1)
        scores = torch.einsum("ihd,jhd->hij", case.q[rows], keys) * width**-0.5
        seen = torch.ones(n_queries, kv_len, dtype=torch.bool).tril(kv_len - n_queries)
        share = scores.exp().masked_fill(~seen, 0).sum(-1)  # of the keys, before normalising
        share = share / (share + sinks.exp().unsqueeze(1))
        expected = case.run()[rows] * share.t().unsqueeze(-1)
        torch.testing.assert_close(got[rows], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_a_query_has_the_same_bits_decoded_alone_or_in_any_chunk(
    dtype: torch.dtype, window: int | None, is_int8: bool
) -> None:
    if not native.available():
        pytest.skip("native kernels are not built")
    case = build([(130, 130), (700, 700)], dtype, is_int8=is_int8)
    whole = case.run(window=window)
    start = int(case.query_starts[1])
    for first, last in [(0, 1), (63, 65), (100, 400), (699, 700)]:
        chunk = paged_attention(
            case.q[start + first : start + last],
            case.k_cache,
            case.v_cache,
            case.page_table[1:],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([last], dtype=torch.int32),
            scale=64**-0.5,
            window=window,
        )
        assert torch.equal(chunk, whole[start + first : start + last])


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_attention(
    dtype: torch.dtype, is_int8: bool, each_kernel_set: Iterator[str]
) -> None:
    case = build([(90, 90), (77, 1)], dtype, is_int8=is_int8)
    expected = case.run()
    for _ in each_kernel_set:
        torch.testing.assert_close(case.run(), expected, **tolerance(dtype))


def test_q_and_out_may_be_columns_of_wider_tensors() -> None:
    case = build([(40, 40)], torch.float32)
    expected = case.run()
    wide_q, wide_out = torch.zeros(40, 15, 64), torch.full((40, 11, 64), 7.0)
    wide_q[:, :9] = case.q
    result = paged_attention(
        wide_q[:, :9],
        case.k_cache,
        case.v_cache,
        case.page_table,
        case.query_starts,
        case.kv_lens,
        scale=64**-0.5,
        out=wide_out[:, 1:10],
    )
    assert torch.equal(result, expected)
    assert torch.equal(wide_out[:, 1:10], expected)
    assert bool((wide_out[:, 0] == 7).all())
    assert bool((wide_out[:, 10] == 7).all())


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=6,
    ),
    heads=st.sampled_from([(9, 3, 64, 16), (4, 1, 32, 32), (6, 2, 16, 16), (2, 2, 80, 48)]),
    window=st.none() | st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    is_int8=st.booleans(),
)
def test_any_mixture_of_requests_and_pages_equals_the_reference(
    spans: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    window: int | None,
    dtype: torch.dtype,
    seed: int,
    is_int8: bool,
) -> None:
    n_heads, n_kv_heads, head_dim, page_size = heads
    case = build(
        spans,
        dtype,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        seed=seed,
        is_int8=is_int8,
    )
    expected = case.reference(dtype, window=window)
    torch.testing.assert_close(case.run(window=window), expected, **tolerance(dtype))
