"""The native CPU LoRA operator against float64, and that its bits depend on nothing but the row."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.cpu import native
from loraplex_kernels.cpu.lora import NativeLora
from loraplex_kernels.errors import BadFactors
from loraplex_kernels.formats.factors import SliceFactors
from loraplex_kernels.formats.layout import LoraSegments, LoraTarget
from loraplex_kernels.layers.packed_linear import PackedLinear
from loraplex_kernels.lora.ops import PreparedTarget, lora_apply
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.segments import build_segments, expand_routed
from tests.support.adapters.lora_problems import (
    MIXES,
    LoraProblem,
    draw_slots,
    make_problem,
    tolerance,
)

needs_native = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler built the kernels"
)
CPU = torch.device("cpu")
SHAPES = [(41, (401,)), (64, (64, 32, 32)), (576, (576, 192, 192)), (33, (1, 7)), (1536, (576,))]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@st.composite
def problems(draw: st.DrawFn) -> LoraProblem:
    in_features, out_features = draw(st.sampled_from(SHAPES))
    n_slots = draw(st.integers(1, 6))
    rank = st.sampled_from([0, 1, 3, 8, 16, 17, 40, 64, 256])
    ranks = [[draw(rank) for _ in out_features] for _ in range(n_slots)]
    n_rows = draw(st.sampled_from([0, 1, 2, 3, 5, 16, 70]))
    mix, k = draw(st.sampled_from(MIXES)), draw(st.sampled_from([1, 1, 2]))
    seed = draw(st.integers(0, 10_000))
    return make_problem(
        in_features=in_features,
        out_features=out_features,
        ranks=ranks,
        slots=draw_slots(mix, n_rows, k, n_slots, seed),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        device=CPU,
        seed=seed,
        with_scale_and_bias=draw(st.booleans()) and k == 1,
    )


@needs_native
@pytest.mark.usefixtures("kernel_set")
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_every_instruction_set_agrees_with_float64(problem: LoraProblem) -> None:
    out, expected = run(problem), problem.expected(segments_of(problem))
    if out.numel():
        # `out` is rounded once for each expert of a row.
        size = max(1.0, expected.abs().max().item()) * problem.slots.shape[1]
        assert (out.double() - expected).abs().max().item() <= tolerance(out.dtype) * size


@needs_native
@settings(max_examples=40, deadline=None)
@given(problem=problems(), seed=st.integers(0, 100))
def test_a_row_has_the_same_bits_in_every_batch(problem: LoraProblem, seed: int) -> None:
    together = run(problem)
    n_rows = problem.x.shape[0]
    assert torch.equal(together, run(problem))
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(together[order], run(problem.rows(order)))
    for row in order[:3].tolist():
        assert torch.equal(together[row : row + 1], run(problem.rows(torch.tensor([row]))))


@needs_native
@pytest.mark.usefixtures("kernel_set")
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_one_call_over_the_base_has_the_bits_of_two(problem: LoraProblem) -> None:
    widths, dtype = problem.target.out_features, problem.x.dtype
    weights = [torch.randn(width, problem.target.in_features).to(dtype) for width in widths]
    packed = PackedLinear(weights, [None, *(torch.randn(width) for width in widths[1:])])
    if packed.native is None:  # an odd number of bfloat16 inputs
        return
    apply = NativeLora(problem.tables)
    segments = segments_of(problem)
    two = packed(problem.x)
    apply(problem.x, segments, two)
    one = torch.empty_like(two)
    apply.over_base("linear_with_lora", packed.native, problem.x, segments, one)
    assert torch.equal(one, two)


@needs_native
@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("rank", [1, 8, 16, 17])
@pytest.mark.parametrize("n_rows", [1, 6])
def test_the_low_rank_intermediate_keeps_sixteen_bits(rank: int, n_rows: int) -> None:
    """The base all but cancels the product, so that an intermediate in bfloat16 would show."""
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, 64, generator=generator).bfloat16()
    b = torch.randn(96, rank, generator=generator).bfloat16()
    x = torch.randn(n_rows, 64, generator=generator).bfloat16()
    h = x.double() @ a.double().T
    product = h @ b.double().T
    out = -product.bfloat16()
    expected = out.double() + product
    apply_one_adapter(a, b, x, out)
    size = h.abs() @ b.double().abs().T
    assert ((out.double() - expected).abs() <= 2**-15 * size + 2**-8 * expected.abs()).all()


@needs_native
@pytest.mark.usefixtures("kernel_set")
def test_an_infinite_intermediate_is_infinity_and_not_no_number() -> None:
    a, b = torch.ones(2, 64).bfloat16(), torch.ones(32, 2).bfloat16()
    x, out = torch.full((1, 64), 3e38).bfloat16(), torch.zeros(1, 32).bfloat16()
    apply_one_adapter(a, b, x, out)
    assert (out == torch.inf).all()


@needs_native
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    for n_rows, k in ((16, 1), (200, 1), (40, 2)):
        problem = make_problem(
            in_features=576,
            out_features=(576, 192),
            ranks=[[8, 64], [16, 16], [64, 3], [100, 0]] * 3,
            slots=draw_slots("distinct", n_rows, k, 12, 1),
            dtype=torch.bfloat16,
            device=CPU,
            seed=3,
        )
        results = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(run(problem))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@needs_native
def test_rows_with_any_stride_and_rows_without_an_adapter_are_left_alone() -> None:
    problem = make_problem(
        in_features=41,
        out_features=(30,),
        ranks=[[8]],
        slots=torch.tensor([[0], [-1], [0]], dtype=torch.int32),
        dtype=torch.float32,
        device=CPU,
        seed=0,
    )
    wide = torch.zeros(3, 64)
    out = wide[:, 10:40]
    apply = NativeLora(problem.tables)
    x = torch.zeros(3, 80)
    x[:, 5:46] = problem.x
    apply(x[:, 5:46], segments_of(problem), out)
    expected = torch.zeros(3, 30)
    lora_apply(
        problem.x,
        problem.tables,
        segments_of(problem),
        out=expected,
    )
    assert torch.equal(out, expected)
    assert out[0].any()
    assert not out[1].any()
    assert not wide[:, :10].any()
    assert not wide[:, 40:].any()


@needs_native
def test_segments_that_point_outside_are_refused() -> None:
    problem = tiny_problem()
    apply = NativeLora(problem.tables)
    with pytest.raises(IndexError, match="slot"):
        apply(problem.x, build_segments(torch.tensor([0, 1], dtype=torch.int32)), problem.base)
    with pytest.raises(IndexError, match="row"):
        apply(problem.x, build_segments(torch.tensor([0] * 3, dtype=torch.int32)), problem.base)
    twice = expand_routed(torch.tensor([[0, 0]], dtype=torch.int32), torch.ones(1, 2))
    with pytest.raises(IndexError, match="ascend"):
        apply(problem.x, twice, problem.base)
    with pytest.raises(ValueError, match=r"needs torch\.float32"):
        apply(problem.x.double(), segments_of(problem), problem.base)


def tiny_problem() -> LoraProblem:
    return make_problem(
        in_features=8,
        out_features=(8,),
        ranks=[[4]],
        slots=torch.zeros(2, 1, dtype=torch.int32),
        dtype=torch.float32,
        device=CPU,
        seed=0,
    )


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


EVERY_SECOND = ints(0, 9, 1, 9)[::2]
FITTING = LoraSegments(ints(0), ints(0, 2), ints(0, 1), torch.ones(2))


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(1, dtype=torch.int64)}, "contiguous int32"),
        ({"indptr": torch.tensor([0, 2])}, "contiguous int32"),
        ({"indices": torch.tensor([0, 1])}, "contiguous int32"),
        ({"indices": EVERY_SECOND}, "contiguous int32"),
        ({"indptr": ints(0, 1, 2)}, r"indptr \[n \+ 1\]"),
        ({"weights": torch.ones(2, dtype=torch.float64)}, "contiguous float32"),
        ({"weights": torch.ones(3)}, "contiguous float32"),
        ({"weights": torch.ones(4)[::2]}, "contiguous float32"),
    ],
)
def test_segments_of_other_types_or_shapes_are_refused(
    change: dict[str, torch.Tensor], message: str
) -> None:
    problem = tiny_problem()
    apply = NativeLora(problem.tables)
    apply(problem.x, FITTING, problem.base.clone())
    with pytest.raises(ValueError, match=message):
        apply(problem.x, dataclasses.replace(FITTING, **change), problem.base)


@needs_native
@pytest.mark.parametrize("indptr", [(0, 3), (-1, 2), (2, 0), (0, 1 << 30)])
def test_an_indptr_that_leaves_the_indices_is_refused(indptr: tuple[int, int]) -> None:
    problem = tiny_problem()
    apply = NativeLora(problem.tables)
    before = problem.base.clone()
    with pytest.raises(IndexError, match="indptr must ascend"):
        apply(problem.x, dataclasses.replace(FITTING, indptr=ints(*indptr)), problem.base)
    assert torch.equal(problem.base, before)


@needs_native
def test_pairs_of_other_types_are_refused() -> None:
    problem = tiny_problem()
    apply = NativeLora(problem.tables)
    packed = PackedLinear([torch.randn(8, 8)], [None])
    assert packed.native is not None
    rows, values = torch.tensor([0, 1]), torch.randn(2, 8)

    def call(rows: torch.Tensor, out: torch.Tensor, values: torch.Tensor) -> None:
        assert packed.native is not None
        apply.over_base("moe_down", packed.native, problem.x, FITTING, out, (rows, values))

    call(rows, problem.base.clone(), values)
    with pytest.raises(ValueError, match="contiguous int64"):
        call(rows.int(), problem.base, values)
    with pytest.raises(ValueError, match=r"needs torch\.float32"):
        call(rows, problem.base, values.double())
    with pytest.raises(ValueError, match="unit column stride"):
        call(rows, problem.base, torch.randn(8, 2).T)
    with pytest.raises(ValueError, match=r"\[2, 8\] for the pairs"):
        call(rows, problem.base, values[:, :7])


def test_without_the_library_the_reference_answers_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an install without a compiler: the file is not there."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not native.available()
            assert not native.available()
        assert [record.message for record in caplog.records] == [
            "native CPU kernels are not built (no C++ compiler?); using PyTorch"
        ]
        problem = make_problem(
            in_features=41,
            out_features=(30,),
            ranks=[[8]],
            slots=torch.zeros(3, 1, dtype=torch.int32),
            dtype=torch.float32,
            device=CPU,
            seed=0,
        )
        segments = segments_of(problem)
        out = problem.base.clone()
        lora_apply(problem.x, problem.tables, segments, out=out)
        assert torch.allclose(out.double(), problem.expected(segments), atol=1e-4)
    finally:
        native.library.cache_clear()


def test_a_prepared_target_reads_slots_of_any_rank_that_the_tables_hold() -> None:
    target = LoraTarget("linear", 32, (24,))
    pool = LoraPool([target], n_bytes=1 << 20, n_slots=4, dtype=torch.float32, max_rank=100)
    prepared = PreparedTarget(pool, "linear")
    x = torch.randn(2, 32)
    for rank in (8, 100):
        a, b = torch.randn(rank, 32), torch.randn(24, rank)
        factors = {"linear": (SliceFactors(a, b),)}
        slot = pool.reserve(pool.pack(factors))
        pool.fill(slot)
        segments = build_segments(torch.tensor([slot, -1], dtype=torch.int32))
        out = torch.zeros(2, 24)
        prepared(x, segments, out)
        assert not out.any(), "a slot that is not published must be rank 0"
        pool.publish(slot)
        prepared(x, segments, out)
        assert torch.allclose(out[0], b @ (a @ x[0]), atol=1e-3)
        assert not out[1].any()
    factors = {"linear": (SliceFactors(torch.zeros(101, 32), torch.zeros(24, 101)),)}
    slot = pool.reserve(pool.pack(factors))
    pool.fill(slot)
    with pytest.raises(BadFactors, match="rank 101, the tables hold 100"):
        pool.publish(slot)


def test_a_mixed_batch_agrees_with_peft() -> None:
    """PEFT's ``adapter_names`` forward is an oracle that shares no code with ours."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(48, 40, bias=False))
    names = ["one", "two", "three"]
    configs = [
        LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], init_lora_weights=False)
        for r in (4, 16, 33)
    ]
    model = get_peft_model(base, configs[0], adapter_name="one")
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    model.eval()
    batch = ["two", "__base__", "one", "three", "two", "one"]
    x = torch.randn(len(batch), 48)
    layer = model.base_model.model[0]
    with torch.no_grad():
        expected = layer(x, adapter_names=batch)
        out = layer.base_layer(x).clone()
    pool = LoraPool([LoraTarget("0", 48, (40,))], n_bytes=1 << 20, n_slots=8, dtype=x.dtype)
    slots: dict[str, int] = {"__base__": -1}
    for name in names:
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        factors = {"0": (SliceFactors(a, b * layer.scaling[name]),)}
        slots[name] = pool.reserve(pool.pack(factors))
        pool.fill(slots[name])
        pool.publish(slots[name])
    segments = build_segments(torch.tensor([slots[n] for n in batch], dtype=torch.int32))
    PreparedTarget(pool, "0")(x, segments, out)
    assert torch.allclose(out, expected, atol=1e-4)


def apply_one_adapter(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    target = LoraTarget("0", a.shape[1], (b.shape[0],))
    pool = LoraPool([target], n_bytes=1 << 20, n_slots=1, dtype=a.dtype)
    slot = pool.reserve(pool.pack({"0": (SliceFactors(a, b),)}))
    pool.fill(slot)
    pool.publish(slot)
    segments = build_segments(torch.full((x.shape[0],), slot, dtype=torch.int32))
    PreparedTarget(pool, "0")(x, segments, out)


def segments_of(problem: LoraProblem) -> LoraSegments:
    if problem.weights is None:
        return build_segments(problem.slots[:, 0])
    return expand_routed(problem.slots, problem.weights)


def run(problem: LoraProblem) -> torch.Tensor:
    out = problem.base.clone()
    apply = NativeLora(problem.tables)
    apply(problem.x, segments_of(problem), out)
    return out
