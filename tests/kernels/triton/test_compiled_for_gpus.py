"""Kernels compile ahead of time for sm_80, sm_90 and sm_100, without spills or excess."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels import LoraTables, LoraTarget
from loraplex_kernels.quantized_weight import WeightFormat
from loraplex_kernels.report import CAPABILITIES, compile_all, find_faults, sample
from loraplex_kernels.sampling import empty_batch
from loraplex_kernels.triton import (
    build_device_segments,
    lora_apply_triton,
    paged_attention_triton,
    sample_tokens_triton,
)
from loraplex_kernels.triton.aot import compile_launch, record_launches
from loraplex_kernels.triton.attention import Division, attention_workspace
from loraplex_kernels.triton.launches import MODEL_TARGETS, all_launches
from loraplex_kernels.triton.tuning import (
    KERNELS,
    TuningKey,
    TuningTable,
    default_table,
    key_for,
    tile_rows,
)


def test_a_sample_of_launches_compiles_without_faults() -> None:
    """All of them: `make kernels-report`."""
    chosen = sample(all_launches(default_table(), CAPABILITIES))
    compiled = compile_all(chosen, n_processes=2)
    assert find_faults(compiled) == []
    assert {one.kernel for one in compiled} >= {
        "attend_kernel",
        "combine_kernel",
        "expand_gate_kernel",
        "expand_kernel",
        "expand_routed_kernel",
        "fused_kernel",
        "matmul_kernel",
        "mix_kernel",
        "norm_heads_kernel",
        "order_pairs_kernel",
        "place_kernel",
        "quantized_linear_kernel",
        "rms_norm_kernel",
        "rope_and_cache_kernel",
        "route_kernel",
        "row_blocks_kernel",
        "sample_kernel",
        "scale_inputs_kernel",
        "scale_inputs_of_each_kernel",
        "shrink_kernel",
        "silu_mul_kernel",
        "sum_kernel",
        "write_kv_kernel",
    }
    halves = [one for one in compiled if one.named.dtype in ("bf16", "fp16")]
    for one in halves:
        if one.kernel in (
            "shrink_kernel",
            "expand_kernel",
            "expand_gate_kernel",
            "attend_kernel",
            "matmul_kernel",
            "quantized_linear_kernel",
        ):
            assert one.resources.instructions  # tensor cores, all of one shape


def test_quantised_products_compile_for_blackwell() -> None:
    """The order of sums is that of the other GPUs': no instruction of Blackwell's own."""
    chosen = [
        named
        for named in all_launches(TuningTable([]), (90,))
        if named.launch.kernel.endswith("quantized_linear_kernel")
        and (named.dtype, named.name.startswith("Llama-3.1-8B o")) == ("bf16", True)
        and named.name.endswith(" 2048 rows")
    ]
    assert len(chosen) == len(WeightFormat) + 1  # int4 with and without zeros
    for named in chosen:
        resources = compile_launch(named.launch, 100)
        assert resources.spill_bytes == 0, named.name
        assert all(".m16n8k16." in kind for kind in resources.instructions)


def test_every_problem_finds_a_tuning_row() -> None:
    table = default_table()
    for target in [*MODEL_TARGETS.values(), LoraTarget("odd", 41, (401,))]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for capability in (80, 86, 89, 90, 100, 120):
                for rank in (16, 64, 512):
                    for rows in (1, 256, 100_000):
                        bounds = {"capability": capability, "rank": rank, "rows": rows}
                        width = target.in_features
                        table.shrink(key_for("shrink", dtype, width=width, **bounds))
                        table.fused(key_for("fused", dtype, width=width, **bounds))
                        wide = sum(target.out_features)
                        expand = table.expand(key_for("expand", dtype, width=wide, **bounds))
                        assert tile_rows(rows) % min(expand.block_m, tile_rows(rows)) == 0


def test_a_table_survives_being_written_and_read() -> None:
    table = default_table()
    assert TuningTable.read(table.dump()).rows == table.rows
    assert {row.key.kernel for row in table.rows} == set(KERNELS)


def test_a_problem_takes_the_tightest_row_that_covers_it() -> None:
    table = default_table()
    few = TuningKey("shrink", 90, "bf16", 16, 4096, 8)
    many = TuningKey("shrink", 90, "bf16", 16, 4096, 5000)
    assert not table.shrink(few).serial
    assert table.shrink(many).serial


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_never_looks_at_data_on_the_host(k: int) -> None:
    """Tensors without data refuse to be read, so no launch waits for the device or follows data."""
    meta = torch.device("meta")
    target = MODEL_TARGETS["Llama-3.1-8B qkv"]
    shape = (8, target.n_slices)
    pages, offsets = (torch.empty(*shape, *rest, device=meta).long() for rest in ((4,), ()))
    tables = LoraTables(torch.empty(shape, device=meta).int(), pages, pages, offsets, offsets)
    x = torch.empty(24, target.in_features, device=meta, dtype=torch.bfloat16)
    out = torch.empty(24, sum(target.out_features), device=meta, dtype=torch.bfloat16)
    slots = torch.empty(24, k, device=meta, dtype=torch.int32)
    weights = None if k == 1 else torch.empty(24, k, device=meta)
    storage = torch.empty(64, device=meta, dtype=torch.bfloat16)
    with record_launches() as launches:
        segments = build_device_segments(slots, weights, n_slots=8)
        lora_apply_triton(x, storage, target, tables, segments, out=out)
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
    assert len(launches) == 1


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
