"""What tests of native kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraplex_kernels.cpu import native


@pytest.fixture(params=list(native.Isa), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Iterator[native.Isa]:
    """Each instruction set of this processor in turn, for the whole process."""
    best = native.isa()
    if best is None or request.param > best:
        pytest.skip(f"no native kernels for {request.param.name} here")
    native.limit_isa(request.param)
    yield request.param
    native.limit_isa(best)
