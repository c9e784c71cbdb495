"""The LoRA kernels equal the float64 reference, and give a row the same bits in every batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraSegments
from loraplex_kernels.triton.arithmetic import reduction
from loraplex_kernels.triton.expand import lora_expand
from loraplex_kernels.triton.group_rows import build_device_segments
from loraplex_kernels.triton.launch_choices import ExpandChoice, ShrinkChoice, tile_programs
from loraplex_kernels.triton.lora import lora_apply_triton
from loraplex_kernels.triton.shrink import lora_shrink, planes_shape
from tests.support.adapters.lora_problems import (
    MIXES,
    LoraProblem,
    draw_slots,
    make_problem,
    tolerance,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels differ between dtypes in one product. One dtype a claim is enough in every run.
BF16_DAILY = [
    torch.bfloat16,
    *(pytest.param(dtype, marks=pytest.mark.nightly) for dtype in (torch.float32, torch.float16)),
]


def _segments(problem: LoraProblem, **sizes: int) -> DeviceSegments:
    n_slots = problem.tables.ranks.shape[0]
    return build_device_segments(problem.slots, problem.weights, n_slots=n_slots, **sizes)


def _apply(problem: LoraProblem, segments: LoraSegments | None = None) -> Tensor:
    out = problem.base.clone()
    segments = _segments(problem) if segments is None else segments
    lora_apply_triton(problem.x, problem.tables, segments, out=out)
    return out


def _two_launches(
    problem: LoraProblem, segments: DeviceSegments, *, serial: bool, block_m: int, block_n: int
) -> Tensor:
    out = problem.base.clone()
    cut = reduction(problem.target.in_features, problem.x.element_size())
    shape = planes_shape(problem.tables, segments, n_planes=1 if serial else cut.n_chunks)
    planes = torch.full(shape, float("nan"), device=problem.x.device)
    inputs = (problem.x, problem.tables, segments)
    lora_shrink(*inputs, choice=ShrinkChoice(serial, 2, 4, 2), planes=planes)
    lora_expand(planes, *inputs, choice=ExpandChoice(block_m, block_n, 4, 2), out=out)
    return out


def _assert_close(out: Tensor, problem: LoraProblem) -> None:
    expected = problem.expected(_segments(problem))
    if out.numel():
        error = float((out.double().cpu() - expected).abs().max())
        assert error <= tolerance(out.dtype) * max(1.0, float(expected.abs().max()))


@st.composite
def problems(draw: st.DrawFn, *, k: int, max_rows: int = 40) -> dict[str, object]:
    n_slices = draw(st.integers(1, 3))
    n_slots = draw(st.integers(1, 5))
    rank = st.one_of(st.integers(0, 40), st.sampled_from([1, 8, 16, 64, 256]))
    return {
        "in_features": draw(st.sampled_from([41, 64, 300])),
        "out_features": tuple(draw(st.sampled_from([33, 64, 401])) for _ in range(n_slices)),
        "ranks": [[draw(rank) for _ in range(n_slices)] for _ in range(n_slots)],
        "slots": draw_slots(
            draw(st.sampled_from(MIXES)),
            draw(st.integers(0, max_rows)),
            k,
            n_slots,
            draw(st.integers(0, 99)),
        ),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 99)),
        "with_scale_and_bias": draw(st.booleans()),
    }


@settings(max_examples=12, deadline=None)
@given(drawn=problems(k=1))
def test_one_adapter_a_row_equals_the_reference(
    device: torch.device, drawn: dict[str, object]
) -> None:
    problem = make_problem(device=device, **drawn)  # type: ignore[arg-type]
    _assert_close(_apply(problem), problem)


@settings(max_examples=8, deadline=None)
@given(drawn=problems(k=2, max_rows=20))
def test_routed_experts_equal_the_reference(device: torch.device, drawn: dict[str, object]) -> None:
    problem = make_problem(device=device, **drawn)  # type: ignore[arg-type]
    _assert_close(_apply(problem), problem)


def _mixed(
    device: torch.device, dtype: torch.dtype, *, k: int, n_rows: int | None = None
) -> LoraProblem:
    """Rows of every adapter and bare ones; fewer routed ones, which the interpreter is slow at."""
    few, seed = (21, 5) if k == 1 else (11, 8)
    return make_problem(
        in_features=300,
        out_features=(65, 33),
        ranks=[(8, 0), (16, 17), (40, 5), (0, 64)],
        slots=draw_slots("zipf", n_rows or few, k, 4, seed=seed),
        dtype=dtype,
        device=device,
        seed=11,
        with_scale_and_bias=True,
    )


def test_programs_walk_the_tiles_of_a_step_that_has_more_of_them(device: torch.device) -> None:
    n_slots = 40
    problem = make_problem(
        in_features=41,
        out_features=(33,),
        ranks=[(4,)] * n_slots,
        slots=(torch.arange(260, dtype=torch.int32) % (n_slots + 1) - 1)[:, None],
        dtype=torch.float32,
        device=device,
        seed=3,
        with_scale_and_bias=True,
    )
    segments = build_device_segments(problem.slots)
    n_tiles = int((segments.tiles[:, 0] >= 0).sum())
    assert n_tiles == n_slots > tile_programs(len(segments.tiles), 260, segments.block_m)
    out = _apply(problem, segments)
    expected = problem.expected(segments)
    assert torch.allclose(out.double().cpu(), expected, atol=tolerance(out.dtype))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2])
def test_runs_repeat_bit_for_bit(device: torch.device, dtype: torch.dtype, k: int) -> None:
    problem = _mixed(device, dtype, k=k)
    first = _apply(problem)
    for _ in range(1 if device.type == "cpu" else 100):
        assert torch.equal(_apply(problem), first)


@pytest.mark.parametrize("dtype", BF16_DAILY)
@pytest.mark.parametrize("k", [1, 2])
def test_a_row_has_the_same_bits_alone_permuted_and_among_others(
    device: torch.device, dtype: torch.dtype, k: int
) -> None:
    problem = _mixed(device, dtype, k=k)
    together = _apply(problem)
    order = torch.randperm(problem.x.shape[0], generator=torch.Generator().manual_seed(2))
    assert torch.equal(_apply(problem.rows(order.to(device))), together[order])
    n_rows = problem.x.shape[0]
    for row in (0, n_rows // 3, n_rows - 1):
        index = torch.tensor([row], device=device)
        assert torch.equal(_apply(problem.rows(index)), together[index])


@pytest.mark.parametrize("dtype", BF16_DAILY)
def test_a_plain_row_has_the_same_bits_beside_routed_ones(
    device: torch.device, dtype: torch.dtype
) -> None:
    routed = _mixed(device, dtype, k=2)
    slots = routed.slots.clone()
    slots[3] = torch.tensor([-1, 2], dtype=torch.int32, device=device)
    assert routed.weights is not None
    weights = routed.weights.clone()
    weights[3] = 1.0
    beside = _apply(dataclasses.replace(routed, slots=slots, weights=weights))
    index = torch.tensor([3], device=device)
    alone = dataclasses.replace(routed.rows(index), slots=slots[index][:, 1:], weights=None)
    assert torch.equal(_apply(alone), beside[index])


@pytest.mark.parametrize("dtype", BF16_DAILY)
def test_no_tile_choice_changes_a_bit(device: torch.device, dtype: torch.dtype) -> None:
    """Tiles of decode and prefill, split or serial sums: one arithmetic."""
    problem = _mixed(device, dtype, k=1, n_rows=36)
    outs = [
        _two_launches(
            problem, _segments(problem, block_m=tile), serial=serial, block_m=block_m, block_n=n
        )
        for tile, serial, block_m, n in (
            (16, False, 16, 64),
            (32, False, 32, 32),
            (64, True, 32, 128),
        )
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)
    routed = _mixed(device, dtype, k=2, n_rows=21)
    routed_outs = [
        _two_launches(
            routed,
            _segments(routed, block_m=tile, rows_per_block=rows),
            serial=serial,
            block_m=16,
            block_n=n,
        )
        for tile, rows, serial, n in ((16, 2, False, 64), (32, 16, True, 32))
    ]
    assert torch.equal(routed_outs[0], routed_outs[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the interpreter, on inf · 0
def test_infinite_weights_of_one_adapter_reach_no_other_row(device: torch.device) -> None:
    problem = _mixed(device, torch.float32, k=2)
    clean = _apply(problem)
    storage = problem.tables.storage.clone()
    first = int(problem.tables.b_pages[2, 0, 0])
    storage[first : first + 65] = float("inf")
    tables = dataclasses.replace(problem.tables, storage=storage)
    out = _apply(dataclasses.replace(problem, tables=tables))
    uses = (problem.slots == 2).any(dim=1)
    assert bool(uses.any())
    assert torch.equal(out[~uses], clean[~uses])


def test_rows_without_an_adapter_keep_their_bits(device: torch.device) -> None:
    problem = _mixed(device, torch.bfloat16, k=1)
    bare = problem.slots[:, 0] < 0
    assert bool(bare.any())
    assert torch.equal(_apply(problem)[bare], problem.base[bare])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("k", [1, 2])
def test_a_cuda_graph_replays_with_other_segments(device: torch.device, k: int) -> None:
    problem = _mixed(device, torch.bfloat16, k=k)
    slots, out = problem.slots.clone(), problem.base.clone()

    def step() -> None:
        segments = build_device_segments(slots, problem.weights, n_slots=4)
        out.copy_(problem.base)
        inputs = (problem.x, problem.tables, segments)
        lora_apply_triton(*inputs, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for mix in MIXES:
        slots.copy_(draw_slots(mix, slots.shape[0], k, 4, seed=8))
        graph.replay()
        changed = dataclasses.replace(problem, slots=slots.clone())
        assert torch.equal(out, _apply(changed))


def test_strided_rows_and_a_wider_out_serve(device: torch.device) -> None:
    problem = _mixed(device, torch.bfloat16, k=2)
    segments = _segments(problem)
    n_rows, width = problem.base.shape
    wide = torch.zeros(n_rows, width + 7, device=device, dtype=torch.float32)
    wide[:, :width] = problem.base.float()
    x = torch.zeros(n_rows, 320, dtype=torch.bfloat16, device=device)
    x[:, :300] = problem.x
    lora_apply_triton(x[:, :300], problem.tables, segments, out=wide[:, :width])
    expected = problem.expected(segments)
    error = float((wide[:, :width].double().cpu() - expected).abs().max())
    assert error < 2e-5 * float(expected.abs().max())  # h keeps 16 bits, out is not rounded to bf16
    assert not wide[:, width:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 299)}, "reads"),
        ({"x": torch.zeros(3, 300, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(300, 3).T}, "contiguous"),
        ({"x": torch.zeros(4, 300)}, "rows"),
        ({"base": torch.zeros(3, 97)}, "out is"),
    ],
)
def test_wrong_inputs_are_refused_before_the_launch(
    device: torch.device, change: dict[str, Tensor], message: str
) -> None:
    problem = _mixed(device, torch.float32, k=1).rows(torch.tensor([0, 1, 2], device=device))
    segments = _segments(problem)
    moved = {name: tensor.to(device) for name, tensor in change.items()}
    with pytest.raises(ValueError, match=message):
        _apply(dataclasses.replace(problem, **moved), segments)  # type: ignore[arg-type]


def test_segments_of_a_cpu_are_refused(device: torch.device) -> None:
    problem = _mixed(device, torch.float32, k=1)
    built = _segments(problem)
    plain = LoraSegments(built.slots, built.indptr, built.indices)
    with pytest.raises(ValueError, match="DeviceSegments"):
        _apply(problem, plain)
