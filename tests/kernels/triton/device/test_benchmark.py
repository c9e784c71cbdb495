"""The GPU benchmark compares systems that compute the same thing."""

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("kernels.benchmarks.bench_gpu")


@pytest.mark.parametrize(
    "system", ["loraplex", "addmm per segment", "gather + einsum", "peft loop"]
)
def test_every_system_computes_the_reference(
    bench: ModuleType, device: torch.device, system: str
) -> None:
    point = bench.Point("SmolLM2-135M qkv", 5, 3, "mixed", "distinct")
    work = point.workload(0, device)
    expected = bench._expected(work)
    bench.SYSTEMS[system](work)()
    error = (work.out.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-2


@pytest.mark.parametrize("system", ["vllm", "sglang csgmv"])
def test_a_system_that_is_not_installed_is_skipped_with_a_reason(
    bench: ModuleType, device: torch.device, system: str
) -> None:
    if importlib.util.find_spec(system.split()[0]) is not None:
        pytest.skip("installed here: the benchmark measures it")
    work = bench.Point("SmolLM2-135M qkv", 1, 1, "8", "identical").workload(0, device)
    with pytest.raises(bench.Skipped, match="not installed"):
        bench.SYSTEMS[system](work)


def test_the_grid_spans_the_shapes_and_repeats_no_point(bench: ModuleType) -> None:
    points = list(bench.grid(quick=False))
    assert len(points) == len(set(points))
    assert {point.module.split()[0] for point in points} == {"SmolLM2-135M", "Llama-3.1-8B"}
    assert {point.n_rows for point in points} == {1, 8, 32, 128, 512, 2048}
    assert {point.mapping for point in points} == set(bench.MAPPINGS)
    assert {point.ranks for point in points} == set(bench.RANKS)
