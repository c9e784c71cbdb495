"""Kernels compile ahead of time for sm_80, sm_90 and sm_100, without spills or excess."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest
import torch

from loraplex_kernels.formats.layout import LoraTables, tile_rows
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_kernels.formats.sampling_batch import empty_batch
from loraplex_kernels.triton.attention import Division, attention_workspace, paged_attention_triton
from loraplex_kernels.triton.group_rows import build_device_segments
from loraplex_kernels.triton.launch_choices import expand_choice, shrink_choice
from loraplex_kernels.triton.lora import lora_apply_triton
from loraplex_kernels.triton.sampling import sample_tokens_triton
from loraplex_training.engine.device_lora import DeviceProduct
from loraplex_training.engine.segmented_lora import GroupedLinear, Segment
from tests.support.gpu.compiled_kernels import (
    CompiledLaunch,
    NamedLaunch,
    compile_all,
    compile_launch,
    count_instructions,
    find_faults,
    record_launches,
)
from tests.support.gpu.kernel_launches import MODEL_TARGETS, all_launches
from tests.support.gpu.meta_device import meta_gpu

MATRIX_KERNELS = {
    "attend_kernel",
    "expand_gate_kernel",
    "expand_kernel",
    "expand_routed_kernel",
    "factor_gradients_kernel",
    "matmul_kernel",
    "quantized_linear_kernel",
    "shrink_kernel",
}
KERNELS = MATRIX_KERNELS | {
    "combine_kernel",
    "draw_kernel",
    "edit_kernel",
    "mix_kernel",
    "norm_heads_kernel",
    "order_pairs_kernel",
    "place_kernel",
    "rms_norm_kernel",
    "rope_and_cache_kernel",
    "route_kernel",
    "row_blocks_kernel",
    "silu_mul_kernel",
    "sort_kernel",
    "write_kv_kernel",
}

pytestmark = pytest.mark.interpreter

GPU_OF = {"bf16": 90, "fp16": 100, "fp32": 80}  # compute capability


@pytest.fixture(scope="module")
def launches() -> list[NamedLaunch]:
    return all_launches()


def sample(launches: Iterable[NamedLaunch]) -> list[NamedLaunch]:
    """The largest launch of every kernel, in bf16 for Hopper where the kernel has that dtype.

    All dtypes, sizes and GPUs are compiled at night.
    """
    groups: dict[tuple[str, str], list[NamedLaunch]] = defaultdict(list)
    for named in launches:
        if named.batch_invariant and named.capability == GPU_OF[named.dtype]:
            groups[named.kernel, named.dtype].append(named)
    return [
        group[-1]
        for (kernel, dtype), group in groups.items()
        if dtype == "bf16" or (kernel, "bf16") not in groups
    ]


def check(compiled: list[CompiledLaunch]) -> None:
    assert find_faults(compiled) == []
    assert {one.named.kernel for one in compiled} == KERNELS
    for one in compiled:
        if one.named.kernel in MATRIX_KERNELS and one.named.dtype != "fp32":
            assert one.resources.instructions, one.named  # tensor cores


def test_a_sample_of_launches_compiles_without_faults(launches: list[NamedLaunch]) -> None:
    check(compile_all(sample(launches)))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch_compiles_without_faults(launches: list[NamedLaunch]) -> None:
    check(compile_all(launches, n_processes=2))


@pytest.mark.nightly
@pytest.mark.slow
def test_quantised_products_compile_for_blackwell(launches: list[NamedLaunch]) -> None:
    """The order of sums is that of the other GPUs': no instruction of Blackwell's own."""
    chosen = [
        named
        for named in launches
        if (named.kernel, named.capability) == ("quantized_linear_kernel", 100)
        and (named.dtype, named.name.startswith("Llama-3.1-8B o")) == ("bf16", True)
        and named.name.endswith(" 2048 rows")
    ]
    assert len(chosen) == len(WeightFormat) + 1  # int4 with and without zeros
    for named in chosen:
        resources = compile_launch(named.launch, 100)
        assert resources.spill_bytes == 0, named.name
        assert all(".m16n8k16." in kind for kind in resources.instructions)


def test_tile_choices_divide_the_tiles_of_a_step() -> None:
    for n_pairs in (1, 256, 257, 1024, 1025, 100_000):
        for itemsize in (2, 4):
            block_m = expand_choice(n_pairs, itemsize).block_m
            assert tile_rows(n_pairs) % min(block_m, tile_rows(n_pairs)) == 0
    assert not shrink_choice(8, 4096, 1, 2).serial  # few rows: a program for each chunk
    assert shrink_choice(5000, 4096, 1, 2).serial


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_never_looks_at_data_on_the_host(k: int) -> None:
    """Tensors without data refuse to be read, so no launch waits for the device or follows data."""
    meta = torch.device("meta")
    target = MODEL_TARGETS["Llama-3.1-8B qkv"]
    shape = (8, target.n_slices)
    pages, offsets = (torch.empty(*shape, *rest, device=meta).long() for rest in ((4,), ()))
    storage = torch.empty(64, device=meta, dtype=torch.bfloat16)
    ranks = torch.empty(shape, device=meta).int()
    tables = LoraTables(target, storage, ranks, pages, pages, offsets, offsets)
    x = torch.empty(24, target.in_features, device=meta, dtype=torch.bfloat16)
    out = torch.empty(24, sum(target.out_features), device=meta, dtype=torch.bfloat16)
    slots = torch.empty(24, k, device=meta, dtype=torch.int32)
    weights = None if k == 1 else torch.empty(24, k, device=meta)
    with record_launches() as launches:
        segments = build_device_segments(slots, weights, n_slots=8)
        lora_apply_triton(x, tables, segments, out=out)
    assert len(launches) == (4 if k == 1 else 5)  # routing 2 or 3, shrink, expand
    cache = torch.empty(16, 8, 16, 128, device=meta, dtype=torch.bfloat16)
    ints = torch.empty(25, device=meta, dtype=torch.int32)
    table = torch.empty(24, 8, device=meta, dtype=torch.int32)
    with record_launches() as launches:
        q = x.view(24, 32, 128)
        paged_attention_triton(q, cache, cache, table, ints, ints[1:], scale=1.0)
    assert len(launches) == 1
    with record_launches() as launches:
        logits = torch.empty(24, 128_256, device=meta)
        sample_tokens_triton(logits, empty_batch(24, 128_256, meta))
    assert len(launches) == 3


def test_a_step_of_training_never_looks_at_data_on_the_host() -> None:
    meta, outputs = torch.device("meta"), (4096, 1024, 1024)
    weights = torch.empty(sum(outputs), 4096, device=meta, dtype=torch.bfloat16)
    names = ("q", "k", "v")
    group = GroupedLinear(names, outputs, lambda: weights, None, lambda: None, DeviceProduct)
    group.segments = [Segment(0, 300, 2.0, (0, 1, 2)), Segment(300, 1024, 1.0, (2,))]
    for rank, members in ((8, (0, 1, 2)), (32, (2,))):
        for i in members:
            for shape in ((rank, 4096), (outputs[i], rank)):
                group.factors.append(torch.empty(shape, device=meta, requires_grad=True))
    x = torch.empty(1024, 4096, device=meta, dtype=torch.bfloat16, requires_grad=True)
    with record_launches() as launches:
        sum(group.output(i, x).sum() for i in range(3)).backward()  # type: ignore[union-attr]
    kernels = Counter(launch.kernel.rpartition(":")[2] for launch in launches)
    assert kernels == {"shrink_kernel": 4, "expand_kernel": 4, "factor_gradients_kernel": 6}
    assert all(factor.grad is not None for factor in group.factors)


def test_sampling_32_rows_takes_less_than_300_us_by_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 128,256 logits with top_k and top_p on an H100, by instructions, bytes and reads.

    Assumes half of the instructions that can be issued, and 400 cycles for a read that the next one
    depends on (the L2 cache takes 270).
    """
    meta = torch.device("meta")
    with meta_gpu(monkeypatch) as gpu:
        sample_tokens_triton(torch.empty(32, 128_256, device=meta), empty_batch(32, 128_256, meta))
        grids = {name: grid for name, grid, _ in gpu.take().grids}
    with record_launches() as launches:
        sample_tokens_triton(
            torch.empty(32, 128_256), empty_batch(32, 128_256, torch.device("cpu"))
        )
    assert [len(grids), len(launches)] == [3, 3]
    assert grids["sort_kernel"] == grids["edit_kernel"] == (63, 32)  # a row over 63 programs
    hertz, issued_a_cycle, bytes_a_second = 1.755e9, 132 * 4, 3.35e12
    seconds = 3 * 3e-6  # to launch
    for launch in launches:
        if launch.kernel.endswith("draw_kernel"):
            # three searches of eight steps: each halves the chunks, reads the sums and adds them up
            reads = dict(launch.constants)["HALVINGS"] + 1
            seconds += 3 * 8 * (400 * reads + 1000) / hertz
        else:
            warps = 63 * 32 * launch.num_warps
            seconds += 2 * warps * count_instructions(launch, 90) / issued_a_cycle / hertz
    seconds += 32 * 63 * 2048 * (4 + 4 + 12) / bytes_a_second  # logits twice, keys and sums
    assert seconds < 0.3e-3


def test_neither_grid_nor_memory_of_attention_grows_with_the_context() -> None:
    for n_rows, n_requests in ((1, 1), (64, 64), (256, 3), (2048, 64), (300, 200)):
        long, longer = (Division.of(n_rows, n_requests, 2**n) for n in (14, 20))
        assert long == longer
        assert long.n_groups == 16
        space = attention_workspace(long, 32, 128, torch.device("meta"))
        n_bytes = 4 * (space.partials.numel() + space.norms.numel())
        assert n_bytes <= 300 * 2**20
    assert Division.of(2048, 64, 2**20).n_places == 512
    assert Division.of(64, 64, 512).n_groups == 1


def test_the_width_of_a_page_table_compiles_nothing_anew() -> None:
    meta = torch.device("meta")
    q = torch.empty(24, 32, 128, device=meta, dtype=torch.bfloat16)
    cache = torch.empty(16, 8, 16, 128, device=meta, dtype=torch.bfloat16)
    ints = torch.empty(25, device=meta, dtype=torch.int32)
    with record_launches() as launches:
        for n_pages in (512, 513, 640, 8192):
            table = torch.empty(24, n_pages, device=meta, dtype=torch.int32)
            paged_attention_triton(q, cache, cache, table, ints, ints[1:], scale=1.0)
    assert len(launches) == 8
    assert len(set(launches)) == 2
