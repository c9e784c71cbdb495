"""Research is tested at night (`make research-tests`), with the fixtures of the other tests."""

from pathlib import Path

import pytest

from tests.conftest import pulled_base, pulled_encoder

__all__ = ["pulled_base", "pulled_encoder"]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.nightly)
