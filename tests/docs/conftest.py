"""The server that the pages talk to: the default base with its demo adapters."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.console.conftest import browser, page  # noqa: F401  fixtures
from tests.support.servers.server_process import ServerProcess, server_process

FLAGS = ("--demos", "--allow-training", "--kv-memory", "384MiB", "--adapter-memory", "256MiB")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's --adapters-dir."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def server(
    pulled_base: Path,
    pulled_encoder: Path,
    served: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    flags = (*FLAGS, "--adapters-dir", served)
    with server_process(pulled_base, tmp_path_factory.mktemp("state"), *flags) as running:
        yield running
