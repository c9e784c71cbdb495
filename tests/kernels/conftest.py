"""What tests of native kernels share."""

from collections.abc import Iterator

import pytest

from kernels.benchmarks import kernel_sets


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def kernel_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of each instruction set in turn, for the whole process; skips those of others."""
    best = kernel_sets.kernel_set()
    name: str = request.param
    if best is None or name not in kernel_sets.kernel_sets():
        pytest.skip(f"no native kernels {name} here")
    kernel_sets.use_kernel_set(name)
    yield name
    kernel_sets.use_kernel_set(best)


@pytest.fixture
def each_kernel_set() -> Iterator[Iterator[str]]:
    """Names of the sets that run here, each in use while it is the last one taken."""
    best = kernel_sets.kernel_set()
    if best is None:
        pytest.skip("no native kernels here")

    def switch() -> Iterator[str]:
        for name in kernel_sets.kernel_sets():
            kernel_sets.use_kernel_set(name)
            yield name

    yield switch()
    kernel_sets.use_kernel_set(best)
