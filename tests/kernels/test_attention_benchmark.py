"""The benchmark of attention: its arithmetic, and what each system launches."""

import importlib
from types import ModuleType

import pytest
import torch

from loraplex_kernels.layers.flashinfer_attention import FlashInferAttention
from tests.support.gpu.flashinfer_stand_in import install_flashinfer
from tests.support.gpu.meta_device import META, meta_gpu


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("kernels.benchmarks.bench_attention")


def test_bytes_and_products_of_a_step(bench: ModuleType) -> None:
    decode = bench.Problem.of([(1, 1024)] * 64, 32, 8, META)
    # 64 requests × 1,024 positions × 8 heads × 128 × (key, value) × 2 bytes, queries and outputs
    assert decode.n_bytes == 268_435_456 + 2 * 64 * 32 * 128 * 2
    assert decode.flop == 4 * 64 * 1024 * 32 * 128
    prompt = bench.Problem.of([(3, 5)], 32, 8, META)
    assert prompt.flop == 4 * (3 + 4 + 5) * 32 * 128  # what a query sees ends with itself


def test_every_system_attends_by_its_own_kernels(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrappers = install_flashinfer(monkeypatch)
    with meta_gpu(monkeypatch) as gpu, torch.inference_mode():
        library = FlashInferAttention(META)
        for requests in bench.STEPS.values():
            problem = bench.Problem.of(requests, 32, 8, META)
            launched = {}
            for system, call in bench.systems(problem, library):
                gpu.take()
                call()
                launched[system] = gpu.take().launches[:1]
            assert launched == {
                "loraplex": ["attend_kernel"],
                "loraplex, batch-invariant": ["attend_kernel"],
                "flashinfer": [],
            }
    assert sum(wrapper.n_runs for wrapper in wrappers) == len(bench.STEPS)
