"""Fixtures that every test may ask for, and the order of files."""

import gc
from pathlib import Path

import pytest

from loraplex_server.model.loading.pull import DEFAULT_BASE, DEFAULT_ENCODER, pull

gc.disable()  # until all is imported and collected, whose objects live as long as the process


def pytest_collection_finish() -> None:
    """Leave all objects so far out of garbage collections, which then look only at a test's own."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # for the interpreter's last collection


@pytest.fixture(scope="session")
def pulled_base() -> Path:
    """The directory of the default base model; pulled once, then instant."""
    return pull(DEFAULT_BASE)


@pytest.fixture(scope="session")
def pulled_encoder() -> Path:
    """The directory of the sentence encoder; pulled once, then instant."""
    return pull(DEFAULT_ENCODER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move files with slow tests to the front.

    With xdist, no worker is then left with a long file when the others have ended.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
