"""A server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from .campaign import Target, fuzz_target


@pytest.fixture(scope="package")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with fuzz_target(tmp_path_factory.mktemp("fuzzed")) as target:
        yield target
